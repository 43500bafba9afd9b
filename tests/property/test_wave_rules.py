"""Waves in whatever order they come, and whichever come twice."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.protocol.waves import AllWritten, FreeSlot, Wave, WaveRing, WriteWave, cut


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_in_any_order_every_byte_is_written_once_and_every_slot_freed_once(image_bytes, wave_bytes, data):
    """Stagings and reports come in any order that a daemon can see, some twice."""
    ring = WaveRing(image_bytes)
    waves = [Wave(begin, end - begin, slot) for slot, (begin, end) in enumerate(cut(image_bytes, wave_bytes))]
    unsaid, told, writing, actions = data.draw(st.permutations(waves)), [], [], []
    while unsaid or writing:
        says = data.draw(st.sampled_from(["stage"] * bool(unsaid) + ["write"] * bool(writing) + ["again"] * bool(told)))
        if says == "stage":
            told.append(unsaid.pop())
            new = ring.staged(told[-1])
        elif says == "write":
            new = ring.written(writing.pop(data.draw(st.integers(0, len(writing) - 1))).begin)
        else:
            new = ring.staged(data.draw(st.sampled_from(told)))
        assert AllWritten() not in actions or not new
        actions += new
        writing += [action.wave for action in new if isinstance(action, WriteWave)]
        firsts = [action for action in actions if isinstance(action, WriteWave) and action.first]
        assert len(firsts) == bool(told)
        if firsts and firsts[0].wave in writing:
            assert writing == [firsts[0].wave]  # nobody else writes before there is a file
    assert actions[-1] == AllWritten()
    written = [action.wave for action in actions if isinstance(action, WriteWave)]
    assert sorted(wave.begin for wave in written) == [wave.begin for wave in waves]
    freed = [action.slot for action in actions if isinstance(action, FreeSlot)]
    assert sorted(freed) == [wave.slot for wave in waves]
