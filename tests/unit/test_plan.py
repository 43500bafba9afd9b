"""Who writes what, and what is refused because it makes no whole checkpoint."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from support.plans import Held, assigned_names, index_places, local_plan, rows

from ckptd.checkpoint.indexing.index import check_index
from ckptd.checkpoint.planning.items import BALANCED, LOWEST_RANK
from ckptd.checkpoint.planning.plan import make_plan
from ckptd.protocol.errors import BadPlan
from ckptd.staging.dtypes import OBJECT

MiB = 1 << 18  # elements of float32


def job(*ranks, fixed=None, settings=BALANCED):
    plans = [local_plan(held, settings=settings) for held in ranks]
    done = None if fixed is None else [None if f is None else np.array(f, np.int64) for f in fixed]
    plan = make_plan(plans, done)
    check_index(plan.index, "here")
    return plan, assigned_names(plans, plan)


def refused(*ranks, fixed=None) -> str:
    with pytest.raises(BadPlan) as caught:
        job(*ranks, fixed=fixed)
    return str(caught.value)


class TestWhoWritesWhat:
    def test_one_rank_writes_all_in_its_order(self):
        _, names = job({"b": Held((2,)), "o": 256, "a": Held((2,))})
        assert names == [["b", "o", "a"]]

    def test_shards_are_written_by_those_who_hold_them(self):
        plan, names = job({"w": rows(0, 3, of=(8, 4))}, {"w": rows(3, 8, of=(8, 4))})
        assert names == [["w"], ["w"]]
        assert {place[1:4] for place in index_places(plan)} == {
            ((0, 0), (3, 4), "__0_0.distcp"),
            ((3, 0), (5, 4), "__1_0.distcp"),
        }

    def test_a_replica_is_written_once(self):
        plan, names = job({"w": Held((4,))}, {"w": Held((4,))}, {"w": Held((4,))})
        assert sorted(names) == [[], [], ["w"]]
        assert len(plan.index.item_name) == 1

    def test_replicas_are_balanced_by_bytes(self):
        sizes = [5, 3, 3, 2, 2, 1]
        held = {f"w{n}": Held((size * MiB,)) for n, size in enumerate(sizes)}
        plan, _ = job(held, held)
        loads = [int(layout.data_bytes.sum()) for layout in plan.layouts]
        assert loads == [8 << 20, 8 << 20]

    def test_replicas_go_to_ranks_whose_own_shards_are_small(self):
        both = {"r": Held((MiB,))}
        _, names = job({"w": rows(0, 7, of=(8, MiB)), **both}, {"w": rows(7, 8, of=(8, MiB)), **both})
        assert names == [["w"], ["w", "r"]]

    def test_objects_are_replicas_too(self):
        plan, names = job({"o": 256, "p": 512}, {"o": 256, "p": 512})
        assert sorted(names) == [["o"], ["p"]]
        assert [flags.tolist() for flags in plan.is_object] == [[True], [True]]

    def test_an_object_of_one_rank_is_that_ranks(self):
        _, names = job({"o": 256}, {"p": 256})
        assert names == [["o"], ["p"]]

    def test_replicas_of_one_shard_are_written_once_each(self):
        first, second = rows(0, 2, of=(4,)), rows(2, 4, of=(4,))
        plan, names = job({"w": first}, {"w": second}, {"w": first}, {"w": second})
        assert sum(map(len, names)) == len(plan.index.item_name) == 2

    def test_the_lowest_rank_writes_where_that_is_asked_for(self):
        held = {f"w{n}": Held((MiB,)) for n in range(4)}
        _, names = job({}, held, held, settings=f"flat=False {LOWEST_RANK}")
        assert names == [[], list(held), []]

    def test_ranks_may_hold_names_in_any_order(self):
        plan, names = job({"a": Held((2,)), "b": Held((3, 3))}, {"b": Held((3, 3)), "c": Held((1,)), "a": Held((2,))})
        assert sorted(name for mine in names for name in mine) == ["a", "b", "c"]
        assert plan.index.names == ["a", "b", "c"]
        assert plan.index.shape.tolist() == [[2, 0], [3, 3], [1, 0]]
        assert plan.index.paths == [("a",), ("b",), ("c",)]

    def test_ranks_may_differ_in_their_number_of_dimensions(self):
        plan, _ = job({"a": Held((2,))}, {"b": Held((1, 2, 3, 4))})
        assert plan.index.shape.tolist() == [[2, 0, 0, 0], [1, 2, 3, 4]]

    def test_empty_and_0d_tensors_are_items(self):
        plan, _ = job({"e": Held((0, 3)), "s": Held(())}, {"e": Held((0, 3)), "s": Held(())})
        assert len(plan.index.item_name) == 2

    def test_nothing_at_all_is_a_checkpoint(self):
        plan, names = job({}, {})
        assert names == [[], []]
        assert plan.index.names == []
        assert [layout.image_bytes for layout in plan.layouts] == [0, 0]


class TestTheIndex:
    def test_it_says_where_each_item_lies(self):
        ranks = [
            {"w": rows(0, 1024, of=(4096, 2)), "o": 256, "r": Held((9,), requires_grad=True)},
            {"w": rows(1024, 4096, of=(4096, 2)), "o": 256, "r": Held((9,), requires_grad=True)},
        ]
        plan, _ = job(*ranks)
        index, seen = plan.index, set()
        for rank, (layout, mine) in enumerate(zip(plan.layouts, plan.index_rows, strict=True)):
            for position, row in enumerate(mine.tolist()):
                seen.add(row)
                assert index.files[index.item_file[row]] == f"__{rank}_0.distcp"
                assert index.record_offset[row] == layout.record_offset[position]
                assert index.record_bytes[row] == layout.record_bytes[position]
                assert index.data_offset[row] == layout.data_offset[position]
                assert index.data_bytes[row] == layout.data_bytes[position]
        assert seen == set(range(4))
        assert index.requires_grad.tolist() == [0, 0, 1]
        assert index.dtype.tolist()[1] == OBJECT


class TestWhatIsRefused:
    def test_a_gap(self):
        reason = refused({"w": rows(0, 3, of=(8, 4))}, {"w": rows(4, 8, of=(8, 4))})
        assert reason == "w: a gap: the ranks hold 28 of 32 elements"

    def test_an_overlap(self):
        assert refused({"w": rows(0, 5, of=(8,))}, {"w": rows(4, 8, of=(8,))}) == "w: chunks overlap"

    def test_a_gap_that_an_overlap_makes_up_for(self):
        assert "w: " in refused({"w": rows(0, 5, of=(10,))}, {"w": rows(2, 7, of=(10,))})

    def test_a_chunk_outside_of_its_tensor(self):
        outside = Held((4,), (((2,), (3,)),))
        assert refused({"w": outside}) == "w: a chunk reaches outside the tensor"

    @pytest.mark.parametrize(
        ("ours", "theirs", "told"),
        [
            (Held((4,)), Held((5,)), "float32[5], a lower rank holds float32[4]"),
            (Held((4,)), Held((4,), dtype="float16"), "float16[4], a lower rank holds float32[4]"),
            (Held((4,)), Held((4, 1)), "float32[4, 1], a lower rank holds float32[4]"),
            (Held((4,)), 256, "an object, a lower rank holds float32[4]"),
            (256, Held(()), "float32[], a lower rank holds an object"),
        ],
    )
    def test_a_key_that_is_another_thing_on_another_rank(self, ours, theirs, told):
        assert told in refused({"x": Held((1,)), "key": ours}, {"key": theirs})
        assert refused({"key": ours}, {"key": theirs}).startswith("key: rank 1 holds ")

    def test_chunks_of_different_size_at_one_place(self):
        reason = refused({"w": rows(0, 2, of=(4,))}, {"w": Held((4,))})
        assert reason == "w: ranks 0 and 1 hold chunks of different size at the same offset"

    @pytest.mark.parametrize("others", [{}, {"x": Held((1,))}], ids=["alone", "among others"])
    def test_a_name_of_which_nobody_holds_anything(self, others):
        assert refused({**others, "w": Held((4,), ())}).startswith("w: a gap: the ranks hold 0 of 4")


class TestRanksThatHaveStaged:
    """Fixed ranks staged under the plan before; what they staged stays as it is."""

    both: ClassVar = {"r": Held((8,)), "q": Held((8,))}

    def test_what_is_staged_is_not_written_again(self):
        _, names = job(self.both, {**self.both, "new": Held((1,))}, fixed=[[0], None])
        assert names == [["r"], ["q", "new"]]

    def test_their_images_keep_their_layout(self):
        before, _ = job(self.both, self.both)
        after, _ = job(self.both, {**self.both, "new": Held((1,))}, fixed=[before.assigned[0], None])
        one, other = vars(before.layouts[0]), vars(after.layouts[0])
        assert all(np.array_equal(one[name], other[name]) for name in one)

    def test_what_was_left_to_a_rank_that_lost_it_is_an_error_that_names_the_key(self):
        reason = refused(self.both, {"r": Held((8,))}, fixed=[[0], None])
        assert reason == "q: it was left to a rank that no longer holds it, and nobody staged it; save again"

    def test_so_it_is_where_several_hold_it_and_none_staged_it(self):
        reason = refused(self.both, self.both, {"r": Held((8,))}, fixed=[[0], [], None])
        assert reason.startswith("q: it was left to a rank that no longer holds it")

    def test_a_copy_that_another_staged_copy_replaces_has_no_row(self):
        plan, _ = job({"r": Held((8,))}, {"r": Held((8,)), "n": Held((1,))}, fixed=[[0], [0, 1]])
        rows_of = [mine.tolist() for mine in plan.index_rows]
        kept = [row for mine in rows_of for row in mine if row >= 0]
        assert sorted(kept) == [0, 1]
        assert sum(row == -1 for mine in rows_of for row in mine) == 1
        assert [len(layout.item) for layout in plan.layouts] == [1, 2]

    def test_a_rank_that_staged_nothing_of_what_it_holds_is_filled_in_by_another(self):
        _, names = job({"r": Held((8,))}, {"r": Held((8,))}, fixed=[[], None])
        assert names == [[], ["r"]]
