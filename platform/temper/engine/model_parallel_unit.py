"""The mesh in the words that DeepSpeed asks for it: its `mpu` argument, whose methods are Megatron-LM's."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from temper.parallel.groups import Group, MeshGroups


class ModelParallelUnit:
    """Data and tensor groups of a mesh without pipeline stages; with stages DeepSpeed makes its own grid."""

    def __init__(self, groups: MeshGroups) -> None:
        self._data, self._tensor = groups.data, groups.tensor
        self._data_group, self._tensor_group = _process_group(groups.data), _process_group(groups.tensor)

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> Any:
        return self._data_group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def _process_group(group: Group) -> Any:
    """DeepSpeed takes None for all ranks, so that a rank alone must be a group, too."""
    if group.process_group is not None:
        return group.process_group
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
