"""How the processes of `train_lm.py` share rows, and with `context_parallel` the columns of each row."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh

from modeling_seqboat.parallel_seqboat import context_parallel, sequence_part


class Parts:
    """Processes as a table of `data` groups that read other rows, and `context` processes that share each row.

    Args:
        context: processes a row; 1 where each process reads rows of its own.
        length: columns of a row.

    Attributes:
        data_rank, data_size: which group of rows this process reads, of how many.

    Raises:
        ValueError: where the processes or the columns cannot be shared out so.
    """

    def __init__(self, accelerator: Accelerator, context: int, length: int):
        world = accelerator.num_processes
        if world % context:
            raise ValueError(f"context_parallel {context} does not divide the {world} processes of this run")
        if length < context:
            raise ValueError(f"sequence_length {length} cannot be cut over context_parallel {context} processes")
        if context > 1 and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("context_parallel goes with DDP and FSDP2, not with DeepSpeed")
        self.context, self.mesh = context, None
        self.data_rank, self.data_size = accelerator.process_index // context, world // context
        if context > 1:
            shape, names = (self.data_size, context), ("data", "context")
            self.mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=names)["context"]

    def running(self, model: torch.nn.Module) -> AbstractContextManager:
        """In which `model` is called."""
        return nullcontext() if self.mesh is None else context_parallel(model, self.mesh)

    def columns(self, length: int) -> slice:
        """This process's columns of rows of `length`."""
        if self.mesh is None:
            return slice(0, length)
        mine = self.of({"input_ids": torch.arange(length)[None]})["input_ids"][0]
        return slice(int(mine[0]), int(mine[-1]) + 1)

    def of(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What this process reads of a batch."""
        return batch if self.mesh is None else sequence_part(batch, self.mesh)

    def state_dict(self) -> dict:
        return {"context": self.context}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for a run that shared out its rows otherwise."""
        if state != self.state_dict():
            raise ValueError(
                f"its run had context_parallel {state['context']}, this one has {self.context}: it would read other "
                "rows"
            )
