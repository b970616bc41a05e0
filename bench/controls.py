"""
can the tests of the loader's promises fail? each control plants one bug in a copy of the sources and runs the test that
must turn red. usage: python bench/controls.py [words of a name], 7 minutes on 2 cpu cores. exit code 1 if a bug went unseen.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTROLS = [ # name, file, line, what it becomes, the test
    ("an epoch without the walk", 'data.py', "        if i < n: #", "        if True: #", 'test_promises.py::test_an_epoch_is_a_permutation_at_any_size'),
    ("an epoch begins one late", 'data.py', "np.divmod(t, n)", "np.divmod(t + U(1), n)", 'test_promises.py::test_every_target_comes_once_an_epoch_times_its_repeat'),
    ("seed + epoch", 'data.py', "hash64(self.seed, EPOCH, epoch)", "hash64(self.seed + epoch, EPOCH)", 'test_promises.py::test_no_two_seeds_or_epochs_share_a_stream'),
    ("another number of rounds", 'data.py', "for k in range(4):\n            left", "for k in range(6):\n            left", 'test_promises.py::test_the_order_is_the_one_that_it_always_was'),
    ("resuming by fast-forward", 'data.py', "        self.window, self.batch = state['window']", "        [self.rows(w) for w in range(min(state['window'], 9))]\n        self.window, self.batch = state['window']",
     'test_promises.py::test_resuming_costs_one_plan_wherever_it_is'),
    ("augments from a global generator", 'data.py', "self.copy[i].astype(U)\n", "self.copy[i].astype(U) + U(np.random.randint(8))\n", 'test_promises.py::test_every_place_can_be_gone_back_to'),
    ("batches that are not part of the state", 'data.py', "'batch': self.batch, 'seed'", "'batch': 0, 'seed'", 'test_promises.py::test_every_place_can_be_gone_back_to'),
    ("ranks that cut off the rest", 'data.py', "        a, b = split(r1 - r0, self.rank, self.world)\n", "        a, b = [(r1 - r0) // self.world * r for r in (self.rank, self.rank + 1)]\n",
     'test_promises.py::test_one_two_four_three_ranks_see_the_same_global_stream'),
    ("ranks that draw for themselves", 'data.py', "        rows = self.rows(place[0])\n", "        rows = self.rows(place[0] + self.rank)\n", 'test_promises.py::test_any_number_of_ranks_sees_the_same_global_stream'),
    ("batches that are kept", 'data.py', "        self.turn = (turn + 1) % 3\n", "        self.turn = (turn + 1) % 3\n        self.__dict__.setdefault('kept', []).append(batch.idx.clone())\n",
     'test_promises.py::test_memory_stays_flat_over_100_000_batches'),
    ("a ring of two", 'data.py', "self.turn = (turn + 1) % 3", "self.turn = (turn + 1) % 2", 'test_promises.py::test_a_batch_is_valid_until_the_second_next_call'),
    ("workers that all do the same", 'data.py', "n, skip = (worker.num_workers, worker.id) if worker else (1, 0)", "n, skip = 1, 0", 'test_promises.py::test_worker_processes_make_the_same_bytes_in_the_same_order'),
    ("a fork that waits for a thread", 'data.py', "if self.pid != os.getpid():", "if self.pid is None:", 'test_promises.py::test_a_loader_that_was_forked_goes_on'),
    ("validation on every rank", 'data.py', "            a, b = split(r1 - r0, rank, world)\n", "            a, b = 0, r1 - r0\n", 'test_promises.py::test_each_validation_query_counts_once_on_any_number_of_ranks'),
    ("a state that fits anything", 'data.py', "or state[key] != now[key])]", "or False)]", 'test_promises.py::test_a_place_in_another_stream_is_refused_by_exactly_the_name_of_what_differs'),
    ("a hash that knows no dihedral", 'sources.py', "        for d in range(8):\n            name[:]", "        for d in range(1):\n            name[:]", 'test_fuzz.py::test_the_hash_of_a_pair_sees_no_color_names_and_no_symmetry'),
    ("a leak guard by name", 'sources.py', "np.isin(corpus.input_hash, np.array(list(asked), np.uint64))", "np.isin(corpus.input_hash, [])", 'test_data.py::test_data_that_holds_a_query_of_adapt_is_refused_dropped_or_allowed'),
    ("a held out query in another task", 'data.py', "            held[p] |= any(", "            held[p] |= False and any(", 'test_data.py::test_an_augmented_copy_of_a_held_out_query_in_another_task_is_held_out_too'),
    ("a door that lets booleans in", 'sources.py', "set(map(type, cells)) == {int}", "set(map(type, cells)) <= {int, bool}", 'test_fuzz.py'),
    ("a door that does not look at colors", 'sources.py', " and min(cells) >= 0 and max(cells) <= 9:", " and min(cells) >= 0 and max(cells) <= 255:", 'test_fuzz.py'),
    ("a corpus is what it is called", 'sources.py', "if name not in ('colors', 'hash', 'input_hash')]", "if name not in ('colors', 'hash', 'input_hash', 'cells')]", 'test_fuzz.py'),
    ("a packed corpus that nobody hashes", 'sources.py', "            if found != manifest['sha256'].get(name):", "            if False:", 'test_fuzz.py::test_a_flipped_byte_a_short_file_and_a_missing_one_are_refused_by_name'),
    ("z counts pairs and not grids", 'data.py', "z = np.uint8(2 * k + side)", "z = np.uint8(2 * k)", 'test_promises.py::test_the_kernels_equal_plain_python_on_1000_random_configurations'),
    ("the loss of a packed row moves on to the next document", 'data.py', "                y[start : at - 1] = x[start + 1 : at]", "                y[start : at] = tokens[start + 1 : at + 1]",
     'test_promises.py::test_the_kernels_equal_plain_python_on_1000_random_configurations'),
    ("a color map with replacement", 'data.py', "code = (visit % total * (", "code = (visit % total // U(2) * (", 'test_data.py::test_color_maps_come_without_replacement_and_keep_what_is_fixed'),
]

def main(words):
    unseen, env = [], {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    controls = [c for c in CONTROLS if all(word in c[0] for word in words)]
    tests = sorted({f"tests/{test}" for *_, test in controls})
    if subprocess.run([sys.executable, '-m', 'pytest', '-q', *tests], cwd=ROOT, env=env).returncode:
        sys.exit("these tests are to be green first")
    with tempfile.TemporaryDirectory() as temp:
        for folder in ('nanoarc', 'tests'):
            shutil.copytree(ROOT / folder, Path(temp) / folder)
        shutil.copy(ROOT / 'pyproject.toml', temp)
        for name, file, line, bug, test in controls:
            path = Path(temp) / 'nanoarc' / file
            text = path.read_text()
            assert text.count(line) == 1, f"{name}: {file} has this line {text.count(line)} times: {line}"
            path.write_text(text.replace(line, bug))
            try:
                command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', f"tests/{test}"]
                code = subprocess.run(command, cwd=temp, env={**env, 'PYTHONPATH': temp}, capture_output=True, timeout=120).returncode
            except subprocess.TimeoutExpired: # a test that hangs is red too
                code = 1
            path.write_text(text)
            print(f"{'red, as it must be' if code == 1 else 'NOT SEEN' if code == 0 else f'pytest failed, exit code {code}'}: {name}", flush=True)
            unseen += [name] * (code != 1)
    print(f"{len(controls) - len(unseen)} of {len(controls)} planted bugs were seen")
    sys.exit(bool(unseen))

if __name__ == '__main__':
    main(sys.argv[1:])
