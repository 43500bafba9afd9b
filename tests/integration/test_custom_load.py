"""Users' own planners and readers, and sharded optimizers, on ranks that have a process group but no collective."""

import socket

import pytest
from support.trainers import Ranks, TrainerRaised

GROUP = "dist.init_process_group('gloo', init_method=init, rank=rank, world_size=world_size)"

OWN = """
import torch.distributed.checkpoint as stock
from dataclasses import replace
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.tensor import DTensor

class Doubles(FileSystemReader):
    '''Doubles what it reads, and looks at the plans of all ranks.'''
    def prepare_global_plan(self, plans):
        self.seen = [len(plan.items) for plan in plans]
        return [replace(plan, storage_data=sum(self.seen)) for plan in super().prepare_global_plan(plans)]
    def read_data(self, plan, planner):
        self.total = plan.storage_data
        future = super().read_data(plan, planner)
        for item in plan.items:
            if item.dest_index.fqn == 'shard':
                planner.lookup_tensor(item.dest_index).mul_(2)
        return future

class Breaks(FileSystemReader):
    def __init__(self, path, rank):
        super().__init__(path)
        self.guilty = rank
    def read_data(self, plan, planner):
        if dist.get_rank() == self.guilty:
            raise OSError('the reader of this rank broke')
        return super().read_data(plan, planner)

class Renames(DefaultLoadPlanner):
    '''Loads 'shard' into 'other'.'''
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.coordinator = is_coordinator
        super().set_up_planner({'shard': state_dict['other']}, metadata, is_coordinator)

def blank():
    mesh = init_device_mesh('cpu', (world_size,))
    return distribute_tensor(torch.zeros(12, 3), mesh, [Shard(0)])
"""

SAVED = """
mesh = init_device_mesh('cpu', (world_size,))
full = torch.arange(36.0).reshape(12, 3)
dcp.save({'shard': distribute_tensor(full, mesh, [Shard(0)]), 'step': 3}, checkpoint_id=path)
mine = full.chunk(world_size)[rank]
target = blank()
forbid_collectives()
"""


@pytest.fixture
def start(daemon, trainers, tmp_path):
    """Start ranks with a gloo group; its store is a file, or rank 0's TCP server."""

    def start(count, init=None):
        ranks = Ranks(trainers.start() for _ in range(count))
        ranks.do(GROUP, init=init or f"file://{tmp_path / 'store'}")
        ranks.do(OWN)
        return ranks

    return start


@pytest.fixture
def free_port():
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ranks(start, tmp_path):
    """Three ranks that have saved a checkpoint; no collective works any more."""
    ranks = start(3)
    ranks.do(SAVED, path=str(tmp_path / "a"))
    return ranks


def test_a_reader_of_ones_own_sees_all_plans(ranks):
    ranks.do("reader, state = Doubles(path), {'shard': target, 'step': 0}\ndcp.load(state, storage_reader=reader)")
    assert ranks.get("torch.equal(target.to_local(), 2 * mine)") == [True] * 3
    assert ranks.get("(state['step'], reader.total)") == [(3, 6)] * 3
    assert ranks.get("getattr(reader, 'seen', None)") == [[2, 2, 2], None, None]


def test_a_planner_of_ones_own_loads_from_a_path(ranks):
    ranks.do("planner = Renames()\ndcp.load({'other': target}, checkpoint_id=path, planner=planner)")
    assert ranks.get("torch.equal(target.to_local(), mine)") == [True] * 3
    assert ranks.get("planner.coordinator") == [True, False, False]


def test_one_ranks_error_is_every_ranks_error_and_the_next_load_works(ranks):
    ranks.do("""
try:
    dcp.load({'shard': target}, storage_reader=Breaks(path, 1))
except Exception as error:
    told = f'{type(error).__name__}: {error}'
""")
    text = "UserCodeFailed: rank 1: Breaks.read_data failed: OSError: the reader of this rank broke"
    assert ranks.get("told") == [text] * 3
    ranks.do("dcp.load({'shard': target}, storage_reader=Breaks(path, None))")
    assert ranks.get("torch.equal(target.to_local(), mine)") == [True] * 3


def test_a_rank_that_dies_in_the_middle_is_named_to_the_others(ranks):
    ranks.do("""
from ckptd.client.loading import generic as load_generic
from ckptd.client.session.exchange import Patience
class Dies(FileSystemReader):
    def read_data(self, plan, planner):
        os.kill(os.getpid(), signal.SIGKILL)
""")
    for rank, trainer in enumerate(ranks):
        trainer.start(
            "load_generic.load_with({'shard': target}, reader=(Dies if rank == 2 else FileSystemReader)(path),"
            " planner=DefaultLoadPlanner(), patience=Patience(step_s=60, silence_s=1.0, beat_s=0.1))",
            rank=rank,
        )
    for trainer in ranks[:2]:
        with pytest.raises(TrainerRaised, match=r"rank 2: .*no sign of life") as raised:
            trainer.finish()
        assert raised.value.kind == "RankFailed"
    ranks[2].wait_gone()


def test_plans_of_tens_of_megabytes_cross_a_tcp_store(start, free_port):
    ranks = start(2, init=f"tcp://127.0.0.1:{free_port}")
    ranks.do("""
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from ckptd.client.loading.generic import load_with
forbid_collectives()
class Own(DefaultLoadPlanner):
    def create_local_plan(self):
        return LoadPlan([], planner_data=os.urandom(10 << 20))
    def create_global_plan(self, plans):
        return plans[::-1]
class Nothing(FileSystemReader):
    def read_metadata(self):
        return Metadata({})
    def set_up_storage_reader(self, metadata, is_coordinator):
        pass
    def read_data(self, plan, planner):
        self.size = len(plan.planner_data)
        future = torch.futures.Future()
        future.set_result(None)
        return future
reader = Nothing('/nowhere')
load_with({}, reader=reader, planner=Own())
""")
    assert ranks.get("reader.size") == [10 << 20] * 2


OPTIMIZER = """
from torch.distributed._shard.sharded_tensor import Shard as Piece, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor

def pieces(full, group=None):
    group = group or dist.group.WORLD
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return _create_chunk_sharded_tensor(full, rank, size, 1, group)

def describe(value):
    '''What a loaded state holds, comparable.'''
    if isinstance(value, dict):
        return {key: describe(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [describe(inner) for inner in value]
    if isinstance(value, ShardedTensor):
        held = [(s.tensor, s.metadata) for s in value.local_shards()]
        local = [(data.tolist(), list(box.shard_offsets), str(box.placement)) for data, box in held]
        shards = [(list(s.shard_offsets), list(s.shard_sizes)) for s in value.metadata().shards_metadata]
        return 'sharded', str(value.dtype), list(value.size()), local, shards
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    return value

big, small = torch.arange(30.0).reshape(10, 3), torch.arange(2.0)
state = {
    'model': {'fc.weight': pieces(big)},
    'optimizer': {
        'state': {
            'fc.weight': {'exp_avg': pieces(big + 100), 'step': torch.tensor(5.0)},
            'fc.bias': {'exp_avg': pieces(small + 200), 'step': torch.tensor(5.0)},
        },
        'param_groups': [{'lr': 0.1, 'params': ['fc.weight', 'fc.bias']}],
        'tried': [{'t': torch.arange(4.0)}, {'t': torch.tensor([1])}],
    },
}
"""
COMPARED = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    theirs = describe(stock.load_sharded_optimizer_state_dict(model, 'optimizer', FileSystemReader(path)))
forbid_collectives()
from ckptd.client.loading.optimizer import load_sharded_optimizer_state_dict
ours = describe(load_sharded_optimizer_state_dict(model, 'optimizer', FileSystemReader(path)))
own = describe(load_sharded_optimizer_state_dict(model, 'optimizer', Doubles(path)))
"""


def test_a_sharded_optimizer_comes_back_as_torch_would_bring_it(start, tmp_path):
    ranks = start(3)
    ranks.do(OPTIMIZER)
    ranks.do("dcp.save(state, checkpoint_id=path)\nmodel = state['model']\n", path=str(tmp_path / "a"))
    ranks.do(COMPARED)
    assert ranks.get("ours == theirs") == [True] * 3
    assert ranks.get("own == theirs") == [True] * 3
    found = ranks[1].get("ours['optimizer']")
    assert found["param_groups"] == [{"lr": 0.1, "params": ["fc.weight", "fc.bias"]}]
    kind, _, size, local, shards = found["state"]["fc.weight"]["exp_avg"]
    assert (kind, size, len(shards)) == ("sharded", [10, 3], 3)
    assert local == [([[100.0 + 3 * row + col for col in range(3)] for row in range(4, 8)], [4, 0], "rank:1/cpu")]
    assert ranks.get("len(ours['optimizer']['state']['fc.bias']['exp_avg'][3])") == [1, 1, 0]


def test_a_tensor_parallel_optimizer_gets_its_slice(start, tmp_path):
    ranks = start(4)
    ranks.do(OPTIMIZER)
    ranks.do(
        """
full = torch.arange(54.0).reshape(9, 6)
replica = {'state': {'fc.weight': {'exp_avg': full, 'step': torch.tensor(5.0)}}}
dcp.save({'optimizer': replica}, checkpoint_id=path)
groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
data, across = groups[rank % 2], pairs[rank // 2]
inner = pieces(torch.zeros(9, 3), data)
boxes = [ShardMetadata([0, 3 * tp], [9, 3], f'rank:{rank - rank % 2 + tp}/cpu') for tp in range(2)]
made = ShardedTensorMetadata(boxes, torch.Size([9, 6]), TensorProperties(dtype=torch.float32))
outer = ShardedTensor._init_from_local_shards_and_global_metadata(
    [Piece(inner, boxes[rank % 2])], made, process_group=across)
model = {'fc.weight': outer}
""",
        path=str(tmp_path / "a"),
    )
    ranks.do("""
from ckptd.client.loading.optimizer import load_sharded_optimizer_state_dict
forbid_collectives()
found = [load_sharded_optimizer_state_dict(model, 'optimizer', reader(path)) for reader in (FileSystemReader, Doubles)]
first, second = [describe(state['optimizer']['state']['fc.weight']) for state in found]
""")
    assert ranks.get("first == second") == [True] * 4
    for rank, found in enumerate(ranks.get("first")):
        rows, columns = (range(5), range(5, 9))[rank // 2], ((0, 1, 2), (3, 4, 5))[rank % 2]
        values = [[6.0 * row + column for column in columns] for row in rows]
        shards = [([0, 0], [5, 3]), ([5, 0], [4, 3])]
        box = (values, [rows[0], 0], f"rank:{rank}/cpu")
        assert found["exp_avg"] == ("sharded", "torch.float32", [9, 3], [box], shards)
        assert found["step"] == ("torch.float32", 5.0)
