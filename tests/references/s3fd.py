"""S3FD in torch and its decoding as loops, written from the description of the published detector."""

import math

import torch
from torch import nn
from torch.nn import functional


class L2Norm(nn.Module):
    def __init__(self, channels, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, x):
        return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) * self.weight.view(1, -1, 1, 1)


class S3FD(nn.Module):
    def __init__(self):
        super().__init__()
        previous = 3
        for stage, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
            for i in range(1, count + 1):
                setattr(self, f"conv{stage}_{i}", nn.Conv2d(previous, channels, 3, 1, 1))
                previous = channels
        self.fc6, self.fc7 = nn.Conv2d(512, 1024, 3, 1, 3), nn.Conv2d(1024, 1024, 1)
        self.conv6_1, self.conv6_2 = nn.Conv2d(1024, 256, 1), nn.Conv2d(256, 512, 3, 2, 1)
        self.conv7_1, self.conv7_2 = nn.Conv2d(512, 128, 1), nn.Conv2d(128, 256, 3, 2, 1)
        self.conv3_3_norm, self.conv4_3_norm = L2Norm(256, 10), L2Norm(512, 8)
        self.conv5_3_norm = L2Norm(512, 5)
        self.maps = ["conv3_3_norm", "conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2", "conv7_2"]
        for name, channels in zip(self.maps, (256, 512, 512, 1024, 512, 256), strict=True):
            classes = 4 if name == "conv3_3_norm" else 2
            setattr(self, f"{name}_mbox_conf", nn.Conv2d(channels, classes, 3, 1, 1))
            setattr(self, f"{name}_mbox_loc", nn.Conv2d(channels, 4, 3, 1, 1))

    def forward(self, x):
        """[B, 3, X, Y] -> per level (probability [B, X', Y'], offsets [B, 4, X', Y'])."""
        seen = {}
        for stage, count in enumerate([2, 2, 3, 3, 3], 1):
            for i in range(1, count + 1):
                x = functional.relu(getattr(self, f"conv{stage}_{i}")(x))
            if stage >= 3:
                seen[f"conv{stage}_3_norm"] = getattr(self, f"conv{stage}_3_norm")(x)
            x = functional.max_pool2d(x, 2, 2)
        for name in ("fc6", "fc7", "conv6_1", "conv6_2", "conv7_1", "conv7_2"):
            x = seen[name] = functional.relu(getattr(self, name)(x))
        out = []
        for name in self.maps:
            conf = getattr(self, f"{name}_mbox_conf")(seen[name])
            if conf.shape[1] == 4:
                conf = torch.cat([conf[:, :3].max(1, keepdim=True)[0], conf[:, 3:]], 1)
            out.append((functional.softmax(conf, 1)[:, 1], getattr(self, f"{name}_mbox_loc")(seen[name])))
        return out


def detect(levels):
    """The faces of one image from NumPy (probability [X, Y], offsets [4, X, Y]) per level: (x1, y1, x2, y2, score)."""
    found = []
    for level, (probability, offsets) in enumerate(levels):
        stride = 4 * 2**level
        for y in range(probability.shape[0]):
            for x in range(probability.shape[1]):
                if probability[y, x] > 0.05:
                    dx, dy, dw, dh = offsets[:, y, x]
                    cx = stride / 2 + x * stride + dx * 0.1 * 4 * stride
                    cy = stride / 2 + y * stride + dy * 0.1 * 4 * stride
                    w, h = 4 * stride * math.exp(0.2 * dw), 4 * stride * math.exp(0.2 * dh)
                    found.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, probability[y, x]))
    found.sort(key=lambda face: -face[4])
    kept = []
    for face in found:
        if all(overlap(face, other) <= 0.3 for other in kept):
            kept.append(face)
    return [face for face in kept if face[4] > 0.5]


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    area = sum((box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b))
    return width * height / (area - width * height)
