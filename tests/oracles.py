"""torch and the published implementations, for tests and benchmarks: import them from here.

The torchvision wheels of the plain package index do not match CPU builds of torch; importing timm or transformers then
fails on operators that nothing here runs. Defining the schemas of the two operators that torchvision's import looks up
is enough. Without torchvision both libraries import as they are.
"""

import contextlib
import importlib.util
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of third parties, at import time
    import torch

    if importlib.util.find_spec("torchvision"):
        torchvision_operators = torch.library.Library("torchvision", "DEF")  # unregisters when it is collected
        with contextlib.suppress(RuntimeError):  # defined already: a torchvision that matches
            torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_grad_enabled(False)

__all__ = ["timm", "torch", "transformers"]
