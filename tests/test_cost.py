"Table 15, and failures: the formula of goodput against a run that is followed step by step."
import math, random
import pytest
from llama_nb.core import UserError
from llama_nb.scale.cost import (FAILURE_RATES, GPU_HOURS_PER_FAILURE, Reliability, advised_interval,
                                 best_interval, carbon_tons, daly, energy_mwh, young)

# --- Table 15 -----------------------------------------------------------------------------------

TABLE_15 = {'OPT-175B': (809_472, 356, 137), 'LLaMA-7B': (82_432, 36, 14), 'LLaMA-13B': (135_168, 59, 23),
            'LLaMA-33B': (530_432, 233, 90), 'LLaMA-65B': (1_022_362, 449, 173)}

@pytest.mark.parametrize('name', TABLE_15)
def test_table_15(name):
    "Energies are cut, and tons are rounded"
    hours, mwh, tons = TABLE_15[name]
    assert (math.floor(energy_mwh(hours)), round(carbon_tons(energy_mwh(hours)))) == (mwh, tons)

def test_what_does_not_reproduce():
    assert math.floor(energy_mwh(1_082_880)) == 476                      # BLOOM; the table says 475
    assert round(2638/energy_mwh(2048)/24) == 122                        # days; the paper says five months
    assert round(energy_mwh(2048*24*365*5/12)) == 3289                   # MWh; the paper says 2,638
    assert math.floor(carbon_tons(2638)) == 1015

def test_the_hours_of_65b_repeat_its_speed():
    days = 1.4e12/(380*2048)/86_400
    assert round(days) == 21 and round(2048*24*round(days, 1)) == TABLE_15['LLaMA-65B'][0]

def test_published_rates():
    rates = sorted(rate.per_gpu_hour for rate in FAILURE_RATES.values())
    assert rates[2] == pytest.approx(1/GPU_HOURS_PER_FAILURE, rel=.01)
    assert FAILURE_RATES['Llama 3 405B'].per_gpu_hour == pytest.approx(419/(54*24*16_384))

# --- goodput ------------------------------------------------------------------------------------

def walk(run, interval, rng, total, tick):
    "A run in ticks of time, each of which may fail: nothing of the formula is in it"
    safe = work = paused = down = elapsed = 0.
    since, written = 0., []                                   # work since the last save; (when, work)
    p = -math.expm1(-tick/run.mtbf)
    while elapsed < total:
        elapsed += tick
        while written and written[0][0] <= elapsed:
            safe = written.pop(0)[1]
        if rng.random() < p:
            work, since, paused, down, written = safe, 0., 0., run.restart, []
        elif down > 0:
            down -= tick
        elif paused > 0:
            paused -= tick
            if paused <= 0: written.append((elapsed + run.write, work))
        else:
            work, since = work + tick, since + tick
            if since >= interval: since, paused = 0., run.pause
    return safe/elapsed

@pytest.mark.parametrize('interval, pause, write, restart', [
    (600, 60, 0, 300), (300, 20, 200, 600), (2000, 20, 300, 100), (1000, 400, 0, 0), (400, 20, 0, 2000)])
def test_goodput_against_a_run_step_by_step(interval, pause, write, restart):
    run = Reliability(5000., float(restart), float(pause), float(write))
    found = walk(run, interval, random.Random(1), 5e6, 10.)    # a thousand failures
    assert run.goodput(interval) == pytest.approx(found, rel=.04)

def test_a_write_in_the_background_costs_as_much_as_a_slower_restart():
    a, b = Reliability(5000., 100., 10., 300.), Reliability(5000., 400., 10.)
    for interval in (400., 1000., 5000.): assert a.goodput(interval) == pytest.approx(b.goodput(interval))

def test_without_failures_only_the_pause_is_lost():
    assert Reliability(1e15, 900., 60., 0.).goodput(540.) == pytest.approx(.9)

def runs():
    rng = random.Random(0)
    for _ in range(200):
        mtbf = 10**rng.uniform(2, 7)
        pause, write = mtbf*10**rng.uniform(-7, .5), rng.choice((0., rng.uniform(0, 900)))
        yield Reliability(mtbf, rng.uniform(0, 2000), pause, write)

def test_no_interval_is_better_than_the_best():
    for run in runs():
        best = best_interval(run)
        grid = [best*(1 + d) for d in (-.5, -.1, -.01, .01, .1, 1.)]
        for t in grid:
            if t >= run.write: assert run.goodput(best) >= run.goodput(t)*(1 - 1e-9), run

def test_young_and_daly_are_its_expansion():
    for ratio, near_young, near_daly in ((1e-6, 1e-3, 1e-8), (1e-4, 1e-2, 1e-6), (1e-2, .06, 1e-3)):
        run = Reliability(1e5, 0., ratio*1e5)
        best = best_interval(run)
        assert young(run)/best - 1 == pytest.approx(math.sqrt(2*ratio)/3, rel=.2)
        assert abs(young(run)/best - 1) < near_young and abs(daly(run)/best - 1) < near_daly

def test_what_is_advised_is_longer_and_nearly_as_good():
    for run in runs():
        best, advised = best_interval(run), advised_interval(run)
        assert advised >= best and run.goodput(advised) >= .995*run.goodput(best)*(1 - 1e-9)
        assert run.goodput(1.01*advised) <= .995*run.goodput(best)*(1 + 1e-9)

@pytest.mark.parametrize('times', [
    (0., 1., 1., 1.), (-1., 1., 1., 1.), (math.nan, 1., 1., 1.), (math.inf, 1., 1., 1.),
    (1., -1., 1., 1.), (1., math.nan, 1., 1.), (1., 1., 0., 1.), (1., 1., 1., -1.)])
def test_times_that_cannot_be(times):
    with pytest.raises(UserError, match='must be a finite number of seconds'): Reliability(*times)

@pytest.mark.parametrize('interval', [0., -1., math.nan])
def test_intervals_that_cannot_be(interval):
    run = Reliability(100., 1., 1.)
    with pytest.raises(UserError, match='interval must be above 0'): run.goodput(interval)
