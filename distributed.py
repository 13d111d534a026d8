"""Process groups, and gradients over many ranks.

Under torchrun each process is a rank of a process group, even a single one. Otherwise there is no group.
torch's DistributedDataParallel is not used, because it rebuilds its buckets after the first backward pass: a
resumed run adds in another order, and losses of 3 ranks differed by 6e-8.
"""

import os
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import devices

RANK_VARIABLES = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE'
BUCKET_BYTES = 64 << 20  # of gradients in one all-reduce
all_gather = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)  # renamed in torch 2.13


@dataclass(frozen=True)
class Place:
    """The rank of this process, and its device."""

    rank: int
    local_rank: int  # among the ranks of this node
    world_size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        return self.rank == 0


# -----------------------------------------------------------------------------
# processes


def start(device: str = 'auto', backend: str = 'auto', timeout_s: int = 600) -> Place:
    """Choose the device, and under torchrun join the process group."""
    given = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}
    if len(given) not in (0, 3) or not all(value.isdecimal() for value in given.values()):
        listed = ', '.join(f'{name}={value}' for name, value in given.items())
        raise ValueError(f'{listed} in the environment: set {", ".join(RANK_VARIABLES)}, MASTER_ADDR, '
                         'MASTER_PORT as torchrun does, or unset them all')
    ranks = {name: int(value) for name, value in given.items()}
    device = devices.choose_device(device, ranks.get('LOCAL_RANK'))
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TensorFloat32 for products of float32 matrices
    if device.type == 'cpu':
        devices.keep_freed_memory()
    if not given:
        return Place(0, 0, 1, device)

    if 'TORCHELASTIC_RUN_ID' in os.environ:
        threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()
    if backend in ('auto', 'nccl'):  # nanoGPT's configs say nccl, on CPUs too
        # gloo exchanges the hosts' values, so that no GPU waits for them
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Place(ranks['RANK'], ranks['LOCAL_RANK'], ranks['WORLD_SIZE'], device)


def end_with_parent(parent):
    """End this process soon after torchrun's: an orphan would train on and keep the lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)  # blocked in a collective, the main thread could not exit by itself


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """Sum a tensor over all ranks, in place. Return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def on_first_rank(function, of_each_node: bool = False):
    """Run function() on the first rank, or the first of each node. Return its result (plain data) on every
    rank, or raise its ValueError or OSError there."""
    if not dist.is_initialized():
        return function()
    outcome, variable = None, 'RANK'
    if of_each_node:
        variable = 'LOCAL_RANK'
    if os.environ.get(variable, '0') == '0':
        try:
            outcome = function(), None
        except (ValueError, OSError) as error:
            outcome = None, error
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    outcomes = [outcome for outcome in outcomes if outcome is not None]
    for _, error in outcomes:
        if error is not None:
            raise error
    return outcomes[0][0]


def largest(number: int) -> int:
    """Return the largest number of all ranks."""
    number = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


# -----------------------------------------------------------------------------
# one step over many ranks


def divide_batch(gradient_accumulation_steps: int, batch_size: int, world_size: int) -> tuple[int, int]:
    """Return the micro-steps of each rank in a step, and the windows in each: batch_size or fewer."""
    total = gradient_accumulation_steps * batch_size
    per_rank, rest = divmod(total, world_size)
    if rest:
        raise ValueError(f'{total} sequences (gradient_accumulation_steps={gradient_accumulation_steps} x '
                         f'batch_size={batch_size}) do not divide over {world_size} ranks: '
                         f'use a multiple of {world_size} for --gradient_accumulation_steps')
    micro_batch_size = max(n for n in range(1, min(batch_size, per_rank) + 1) if per_rank % n == 0)
    return per_rank // micro_batch_size, micro_batch_size


def prepare(model, place: Place, *, parallel='ddp', shard_ranks=0, dtype=torch.float32):
    """Move a GPT to its device, with the same weights on all ranks. Call it before making optimizers.

    dtype  of matrix products; with fsdp in bfloat16 the blocks' weights are gathered in it
    """
    if parallel == 'fsdp' and dist.is_initialized():
        return shard(model, place, shard_ranks, dtype)
    model.to(place.device)
    if dist.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    return model


def shard(model, place, shard_ranks, dtype):
    n_ranks, n_shards = place.world_size, shard_ranks or place.world_size
    if n_ranks % n_shards:
        raise ValueError(f'shard_ranks={shard_ranks} does not divide {n_ranks} ranks: '
                         'use a number that does, or 0 for all')
    names, shape = ('shard',), (n_shards,)
    if n_shards < n_ranks:
        names, shape = ('replicate', 'shard'), (n_ranks // n_shards, n_shards)
    mesh = init_device_mesh(place.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:  # autocast casts the inputs, and leaves the residual sum in float32
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Whole blocks compile without a graph break. In bfloat16 the norms' weights are cast, too, which torch's
    # LayerNorm does not accept on a CPU: there the norms stay with the root.
    for block in model.transformer.h:
        if place.device.type == 'cpu' and dtype == torch.bfloat16:
            block = [block.attn, block.mlp]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    model.to(place.device)

    for method in ('loss_sum', 'score'):  # FSDP gathers the weights for forward() by itself
        register_fsdp_forward_method(model, method)
    warnings.filterwarnings('ignore', message='FSDP2-wrapped module .* returned a view')
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # FSDP reuses the tensors of its first pass: no inference-mode tensors
            module.unshard()
            module.reshard()
    return model


def compiled_loss(model):
    """Return model.loss_sum, compiled for batches of one shape, after prepare().

    With FSDP, each block and the cross entropy: gathering weights would break a larger graph.
    """
    if not isinstance(model, FSDPModule):
        return torch.compile(model.loss_sum, dynamic=False)
    model.compile_blocks()
    model.cross_entropy = torch.compile(model.cross_entropy, dynamic=False)
    return model.loss_sum


def sync_gradients(model, reduce: bool):
    """Tell FSDP whether to reduce gradients in this micro-step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


def sum_gradients(model):
    """Sum the gradients over all ranks after the last micro-step, in equal buckets; FSDP already has."""
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for bucket in torch._utils._take_tensors(grads, BUCKET_BYTES):
        flat = torch._utils._flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        torch._foreach_copy_(bucket, torch._utils._unflatten_dense_tensors(flat, bucket))


def whole(tensor):
    """Return all of a tensor that FSDP has sharded. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
