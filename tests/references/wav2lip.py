"""The published Wav2Lip networks in torch, written from their description (shared names, nothing of omnax's code).

State dicts have the published key names.
"""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """conv_block.0 convolution (or transposed), conv_block.1 batch norm, residual, ReLU; without norm: leaky ReLU."""

    def __init__(self, cin, cout, k, s, p, residual=False, transposed=False, norm=True):
        super().__init__()
        conv = (
            nn.ConvTranspose2d(cin, cout, k, s, p, 0 if s == 1 else 1) if transposed else nn.Conv2d(cin, cout, k, s, p)
        )
        self.conv_block = nn.Sequential(conv, nn.BatchNorm2d(cout)) if norm else nn.Sequential(conv)
        self.residual, self.norm = residual, norm

    def forward(self, x):
        y = self.conv_block(x)
        if not self.norm:
            return functional.leaky_relu(y, 0.01)
        return functional.relu(y + x if self.residual else y)


def same(channels, n):
    return [Block(channels, channels, 3, 1, 1, residual=True) for _ in range(n)]


def audio_layers(last_residuals):
    return [
        Block(1, 32, 3, 1, 1), *same(32, 2),
        Block(32, 64, 3, (3, 1), 1), *same(64, 2),
        Block(64, 128, 3, 3, 1), *same(128, 2),
        Block(128, 256, 3, (3, 2), 1), *same(256, last_residuals),
        Block(256, 512, 3, 1, 0), Block(512, 512, 1, 1, 0),
    ]  # fmt: skip


class Wav2Lip(nn.Module):
    def __init__(self):
        super().__init__()
        down = lambda cin, cout, n: nn.Sequential(Block(cin, cout, 3, 2, 1), *same(cout, n))  # noqa: E731
        up = lambda cin, cout: nn.Sequential(Block(cin, cout, 3, 2, 1, transposed=True), *same(cout, 2))  # noqa: E731
        self.face_encoder_blocks = nn.ModuleList([
            nn.Sequential(Block(6, 16, 7, 1, 3)),
            down(16, 32, 2), down(32, 64, 3), down(64, 128, 2), down(128, 256, 2), down(256, 512, 1),
            nn.Sequential(Block(512, 512, 3, 1, 0), Block(512, 512, 1, 1, 0)),
        ])  # fmt: skip
        self.audio_encoder = nn.Sequential(*audio_layers(1))
        self.face_decoder_blocks = nn.ModuleList([
            nn.Sequential(Block(512, 512, 1, 1, 0)),
            nn.Sequential(Block(1024, 512, 3, 1, 0, transposed=True), *same(512, 1)),
            up(1024, 512), up(768, 384), up(512, 256), up(320, 128), up(160, 64),
        ])  # fmt: skip
        self.output_block = nn.Sequential(Block(80, 32, 3, 1, 1), nn.Conv2d(32, 3, 1), nn.Sigmoid())

    def forward(self, mel, face):
        """[B, 1, 80, 16], [B, 6, 96, 96]; or [B, T, 1, 80, 16], [B, 6, T, 96, 96], flattened with time outermost."""
        batch, clip = mel.shape[0], face.ndim == 5
        if clip:
            mel = torch.cat(list(mel.unbind(1)))
            face = torch.cat(list(face.unbind(2)))
        skips = []
        for block in self.face_encoder_blocks:
            face = block(face)
            skips.append(face)
        x = self.audio_encoder(mel)
        for block in self.face_decoder_blocks:
            x = torch.cat([block(x), skips.pop()], 1)
        x = self.output_block(x)
        return torch.stack(x.split(batch), 2) if clip else x


class SyncNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.face_encoder = nn.Sequential(
            Block(15, 32, 7, 1, 3),
            Block(32, 64, 5, (1, 2), 1), *same(64, 2),
            Block(64, 128, 3, 2, 1), *same(128, 3),
            Block(128, 256, 3, 2, 1), *same(256, 2),
            Block(256, 512, 3, 2, 1), *same(512, 2),
            Block(512, 512, 3, 2, 1), Block(512, 512, 3, 1, 0), Block(512, 512, 1, 1, 0),
        )  # fmt: skip
        self.audio_encoder = nn.Sequential(*audio_layers(2))

    def forward(self, mel, face):
        return tuple(
            functional.normalize(net(x).flatten(1)) for net, x in ((self.audio_encoder, mel), (self.face_encoder, face))
        )


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        plan = [
            [(3, 32, 7, 1, 3)],
            [(32, 64, 5, (1, 2), 2), (64, 64, 5, 1, 2)],
            [(64, 128, 5, 2, 2), (128, 128, 5, 1, 2)],
            [(128, 256, 5, 2, 2), (256, 256, 5, 1, 2)],
            [(256, 512, 3, 2, 1), (512, 512, 3, 1, 1)],
            [(512, 512, 3, 2, 1), (512, 512, 3, 1, 1)],
            [(512, 512, 3, 1, 0), (512, 512, 1, 1, 0)],
        ]
        self.face_encoder_blocks = nn.ModuleList(
            [nn.Sequential(*(Block(*row, norm=False) for row in rows)) for rows in plan]
        )
        self.binary_pred = nn.Sequential(nn.Conv2d(512, 1, 1), nn.Sigmoid())

    def forward(self, faces):
        """Whole faces [B, 3, T, 96, 96] -> probabilities [T B, 1]."""
        x = torch.cat(list(faces[:, :, :, faces.shape[3] // 2 :].unbind(2)))
        for block in self.face_encoder_blocks:
            x = block(x)
        return self.binary_pred(x).view(len(x), -1)


def randomise(network, seed):
    """Batch statistics and gains away from 0 and 1, so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.6, 1.4), (module.running_var, 0.6, 1.4),
                (module.bias, -0.3, 0.3), (module.running_mean, -0.3, 0.3),
            ):  # fmt: skip
                tensor.data.uniform_(low, high, generator=generator)
    return network
