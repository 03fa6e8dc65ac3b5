"""What a plan knows of the digits' MLP with 32 hidden units, for tests that build none."""

from __future__ import annotations

from temper.plan.probe import ModelFacts, PrunableWeight

FACTS = ModelFacts(
    num_parameters=2410,
    num_trainable=2410,
    parameter_sizes=(2048, 32, 320, 10),
    buffer_bytes=0,
    activation_bytes_per_example=512,
    forward_flops_per_example=4800,
    output_shape=(10,),
)
PRUNABLE = (PrunableWeight("1.weight", (32, 64), "linear"), PrunableWeight("3.weight", (10, 32), "linear"))
