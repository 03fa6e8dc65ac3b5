"""What every rank of a test imports: done once, in the process that the ranks are forked from (see distributed.py).

The imports take eight seconds of a core. Nothing here may start a thread, which a fork would lose.
"""

import torch
import torch._dynamo

import temper.engine.build
import temper.engine.deepspeed_setup
import temper.worker
from temper.torchvision_import import declare_torchvision_operators

declare_torchvision_operators()
import torchmetrics.classification  # noqa: E402, F401

torch.set_num_threads(1)
temper.engine.deepspeed_setup.prepare("cpu")
