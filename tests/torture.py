"The long form of the tests on death: `make torture`, some minutes on two cores."
import pytest
from llama_nb.data.pipeline import find_files
from test_data_corpus import RAW, kills
from test_data_engine import calm, killed_so_often, place          # noqa: F401, fixtures are used by name
from test_parallel_runs import torture

@pytest.mark.timeout(3600)
@pytest.mark.parametrize('args', [('--train.micro-batch-size', 2), ('--parallel.tensor', 2)])
def test_a_random_rank_of_four_is_killed_twenty_times(run_file, start_ranks, tmp_path, args):
    assert torture(4, 20, 400, run_file, start_ranks, tmp_path, 2, *args) == 19

@pytest.mark.timeout(3600)
@pytest.mark.parametrize('workers', [1, 2, 4])
def test_a_data_job_is_killed_at_twenty_random_instants(place, calm, workers):              # noqa: F811
    assert killed_so_often(place, calm, workers, 20) >= 1

@pytest.mark.timeout(3600)
@pytest.mark.parametrize('workers', [1, 2, 4])
@pytest.mark.parametrize('source', RAW)
def test_a_pipeline_is_killed_twenty_times(tmp_path, source, workers):
    RAW[source](tmp_path/'raw')
    assert kills(find_files(source, [tmp_path/'raw']), source, tmp_path, workers, 20, True, workers) > 10
