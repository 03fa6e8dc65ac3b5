"""The learning rate's factor at each step, by value."""

import pytest

from temper.config.schema import RampConfig, ScheduleConfig
from temper.schedules import build_ramp, build_schedule


def test_constant_is_one_throughout():
    schedule = build_schedule(ScheduleConfig(kind="constant"), 10)
    assert [schedule(step) for step in (0, 5, 9, 100)] == [1.0, 1.0, 1.0, 1.0]


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_final_factor():
    schedule = build_schedule(ScheduleConfig(kind="cosine", final_factor=0.1), 100)
    assert schedule(0) == 1.0
    assert schedule(50) == pytest.approx(0.55)
    assert schedule(25) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2**-0.5))
    assert schedule(100) == pytest.approx(0.1)


def test_linear_falls_by_equal_parts():
    schedule = build_schedule(ScheduleConfig(kind="linear"), 4)
    assert [schedule(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_linear_falls_to_the_final_factor():
    schedule = build_schedule(ScheduleConfig(kind="linear", final_factor=0.5), 4)
    assert [schedule(step) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_step_multiplies_by_gamma_at_each_milestone():
    schedule = build_schedule(ScheduleConfig(kind="step", milestones=[0.5, 0.7], gamma=0.1), 10)
    assert [schedule(step) for step in (0, 4, 5, 6, 7, 9)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step"])
def test_warm_up_rises_from_above_zero_and_meets_the_decay_at_one(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=3, milestones=[0.9] if kind == "step" else [])
    schedule = build_schedule(config, 20)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_decay_takes_what_the_warm_up_leaves_of_the_budget():
    schedule = build_schedule(ScheduleConfig(kind="linear", warmup_steps=2), 6)
    assert [schedule(step) for step in range(2, 7)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_steps_beyond_the_budget_keep_its_last_value():
    assert build_schedule(ScheduleConfig(kind="cosine", final_factor=0.2), 10)(1000) == pytest.approx(0.2)


def test_a_budget_of_one_step_uses_the_full_learning_rate():
    assert build_schedule(ScheduleConfig(kind="cosine"), 1)(0) == 1.0


def test_a_ramp_goes_from_start_to_end_and_stays():
    ramp = build_ramp(RampConfig(start=20.0, end=4.0), 5)
    assert [ramp(step) for step in (0, 1, 2, 3, 4, 5, 1000)] == [20.0, 16.0, 12.0, 8.0, 4.0, 4.0, 4.0]
    ramp = build_ramp(RampConfig(kind="cosine", start=0.0, end=1.0), 5)
    assert [ramp(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([0.0, (1 - 2**-0.5) / 2, 0.5, 1.0, 1.0])


def test_a_ramp_of_one_step_is_its_start_and_a_number_is_no_ramp():
    assert build_ramp(RampConfig(start=0.1, end=0.7), 1)(0) == 0.1
    assert [build_ramp(4.0, 10)(step) for step in (0, 5, 99)] == [4.0, 4.0, 4.0]
    assert build_ramp(RampConfig(start=0.1, end=0.7), 3)(2) == 0.7, "exactly"
