"""What scripts/bench concludes, on made-up numbers: medians, ranks, verdicts, stored files, README's table."""

import contextlib
import io
import itertools
import json
import tempfile
import unittest
from pathlib import Path

import canned
from report import charts, compare, context, plan, ranks, readme, results, run, store, summary


def brute_force_p(a, b):
    """All ways to deal the numbers into two heaps of these sizes."""
    above = lambda x, y: sum(second > first for first in x for second in y)
    both, observed, good, total = [*a, *b], above(a, b), 0, 0
    for chosen in itertools.combinations(range(len(both)), len(b)):
        second = [both[i] for i in chosen]
        first = [value for i, value in enumerate(both) if i not in chosen]
        good, total = good + (above(first, second) >= observed), total + 1
    return good / total


class Ranks(unittest.TestCase):
    def test_equals_counting_all_arrangements(self):
        for a, b in (([1, 2, 3], [4, 5, 6]), ([1, 5, 3, 9], [2, 4, 8]), ([7, 8], [1, 2, 3, 10]), ([3], [1])):
            self.assertAlmostEqual(ranks.p_larger(a, b), brute_force_p(a, b))

    def test_of_all_numbers_equal_says_nothing(self):
        self.assertEqual(ranks.p_larger([1, 1, 1], [1, 1, 1]), 1)
        self.assertEqual(ranks.p_larger([], [1]), 1)

    def test_with_ties_is_close_to_counting(self):
        a, b = [1, 2, 2, 3, 4, 5, 6], [2, 4, 5, 6, 7, 8, 8]
        self.assertAlmostEqual(ranks.p_larger(a, b), brute_force_p(a, b), delta=0.03)

    def test_smallest_p_is_that_of_full_separation(self):
        self.assertAlmostEqual(ranks.smallest_p(3, 3), ranks.p_larger([1, 2, 3], [4, 5, 6]))


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.root = Path(temporary.name)


class Reading(Folder):
    def test_repetitions_become_medians_and_suffixes_go(self):
        read = results.read(canned.write(self.root))
        row = read.rows["prefill/causal/f32/n:512/heads:8/kv_heads:8/d:128/threads:1"]
        self.assertAlmostEqual(row.milliseconds, 512 * 512 / 1e5)
        self.assertEqual((row.path, row.sizes["n"], len(row.times)), (["prefill", "causal", "f32"], 512, 3))
        self.assertEqual(row["max_abs_error"], 2e-7)

    def test_a_row_with_an_error_has_no_figure(self):
        def wrong(name, raw):
            return {**raw, "error_occurred": True, "error_message": "wrong: rms error 1"} if "/int8/" in name else raw
        read = results.read(canned.write(self.root, wrong))
        self.assertFalse(any("int8" in row.path for row in read.find("decode")))
        self.assertIn("wrong: rms error 1", summary.markdown(read, *charts.all_charts(read)))

    def test_every_missing_file_is_said_and_the_rest_drawn(self):
        everything, _ = charts.all_charts(results.read(canned.write(self.root / "all")))
        self.assertEqual(len(everything), len(charts.ALL))
        for program in canned.rows():
            read = results.read(canned.write(self.root / program, only=[program]))
            drawn, missing = charts.all_charts(read)
            self.assertEqual(len(drawn) + len(missing), len(charts.ALL), program)
            self.assertTrue(missing)
            self.assertIn("## Left out", summary.markdown(read, drawn, missing))


class Charts(Folder):
    def test_break_even_lies_between_the_rows_around_one(self):
        self.assertAlmostEqual(charts.crossing([(64, 2.0), (128, 1.25), (192, 0.75)]), 160)
        self.assertIsNone(charts.crossing([(64, 0.9), (128, 0.8)]))

    def test_limits_of_the_machine_are_what_rows_were_measured_against(self):
        peak, bandwidth = charts.machine_limits(results.read(canned.write(self.root)))
        self.assertAlmostEqual(peak / canned.PEAK, 1)
        self.assertAlmostEqual(bandwidth / canned.BANDWIDTH, 1)

    def test_a_faster_peer_is_named_with_by_how_much(self):
        read = results.read(canned.write(self.root))
        lines = summary.peer_lines(read)
        self.assertEqual(len(lines), 3)
        self.assertTrue(all("fastlib" in line and "peer 2x faster" in line and "qkv 1.5x faster" in line for line in lines))
        self.assertIn("in 3 of 6 comparisons the peer is faster, at most fastlib with 2x", " ".join(summary.findings(read)))
        self.assertEqual(charts.verdict(1.04), "tie")
        self.assertEqual(charts.verdict(1 / 1.04), "tie")

    def test_roofline_has_flops_of_decode_and_bytes_of_prefill(self):
        read = results.read(canned.write(self.root))
        flops, moved, rate = charts.work(read.rows["decode/contiguous/f32/n:32768/heads:32/kv_heads:8/d:128/batch:1/threads:1"])
        self.assertEqual(flops, 4 * 32768 * 32 * 128)
        self.assertAlmostEqual(moved, canned.BANDWIDTH * 0.85 * 8e-3, delta=1)
        self.assertAlmostEqual(rate, flops / 8e-3, delta=1)
        flops, moved, _ = charts.work(read.rows["prefill/causal/int8/n:2048/heads:8/kv_heads:8/d:128/threads:1"])
        self.assertEqual(moved, 2048 * 8 * 128 * (4 + 4 + 1 + 1))


class Compare(Folder):
    def verdicts(self, change):
        old, new = canned.write(self.root / "old"), canned.write(self.root / "new", change)
        return {row[0]: row[1] for row in compare.compare(results.read(old), results.read(new))}

    def run_main(self, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = compare.main([str(argument) for argument in arguments])
        return status, said.getvalue()

    def test_equal_results_are_the_same_and_status_0(self):
        self.assertEqual(set(self.verdicts(lambda name, raw: raw).values()), {"same"})
        self.assertEqual(self.run_main(self.root / "old", self.root / "new")[0], 0)

    def test_slower_beyond_noise_is_found_and_status_1(self):
        def slow(name, raw):
            return {**raw, "real_time": raw["real_time"] * 1.2} if name.startswith("batch/") else raw
        found = self.verdicts(slow)
        self.assertEqual({name for name, verdict in found.items() if verdict == "slower"},
                         {name for name in found if name.startswith("batch/")})
        status, said = self.run_main(self.root / "old", self.root / "new")
        self.assertEqual(status, 1)
        self.assertIn("1.200x", said)

    def test_a_busy_clock_is_not_a_slow_kernel(self):
        def half_speed(name, raw):  # the peak fell as well, so fractions did not move
            return {**raw, "real_time": raw["real_time"] * 2} if name.startswith("prefill/") else raw
        self.assertNotIn("slower", self.verdicts(half_speed).values())

    def test_a_lower_fraction_is_slower(self):
        def lower(name, raw):
            return {**raw, "peak_fraction": raw["peak_fraction"] * (0.8 - 0.001 * raw["repetition_index"])} \
                if "prefill/causal/bf16" in name else raw
        self.assertEqual([name for name, verdict in self.verdicts(lower).items() if verdict == "slower"],
                         ["prefill/causal/bf16/n:2048/heads:8/kv_heads:8/d:128/threads:1"])

    def test_a_gap_inside_the_spread_is_noise(self):
        def noisy(name, raw):
            return {**raw, "real_time": raw["real_time"] * (0.9, 1.3, 1.3)[raw["repetition_index"]]} if "scaling" in name else raw
        self.assertNotIn("slower", self.verdicts(noisy).values())

    def test_faster_is_no_failure_and_wrong_is(self):
        def faster(name, raw):
            return {**raw, "real_time": raw["real_time"] / 2}
        self.assertIn("faster", self.verdicts(faster).values())
        self.assertEqual(self.run_main(self.root / "old", self.root / "new")[0], 0)
        canned.write(self.root / "new", lambda name, raw: {**raw, "error_occurred": True, "error_message": "wrong"})
        self.assertEqual(self.run_main(self.root / "old", self.root / "new")[0], 1)

    def test_single_repetitions_are_too_few_and_status_2(self):
        self.verdicts(lambda name, raw: raw if raw["repetition_index"] == 0 else None)
        status, said = self.run_main(self.root / "old", self.root / "new")
        self.assertEqual(status, 2)
        self.assertIn("too few", said)


class Storing(Folder):
    def test_a_stored_file_holds_no_host_path_or_load_and_reads_as_the_folder(self):
        folder = canned.write(self.root / "run")
        path = store.store(folder, self.root / "results")
        self.assertEqual(path.name, "test-cpu-family-1-model-2-2-cores.json")
        text = path.read_text()
        for private in ("secret-host", "/home/", "load_avg", "host_name", "executable"):
            self.assertNotIn(private, text)
        stored, read = results.read(path), results.read(folder)
        self.assertEqual(stored.rows.keys(), read.rows.keys())
        self.assertEqual(stored.context["libraries"]["torch"], "1.2.3")
        for name, row in read.rows.items():
            self.assertAlmostEqual(stored.rows[name].milliseconds / row.milliseconds, 1, places=4)
            self.assertEqual(stored.rows[name].program, row.program)
        self.assertTrue(all(row[1] == "same" for row in compare.compare(read, stored)))

    def test_paths_among_context_values_are_dropped(self):
        self.assertEqual(context.stripped({"a": "/tmp/x", "b": "x/y", "load_avg": [1]}), {"b": "x/y"})

    def test_readme_is_written_from_all_stored_files_and_a_changed_number_is_found(self):
        page = self.root / "README.md"
        page.write_text("before\n" + readme.BEGIN + "\n" + readme.END + "\nafter\n")
        self.assertIn("holds no results", readme.check(page))
        folder = canned.write(self.root / "run")
        store.store(folder, self.root / readme.STORED)
        about = json.loads((folder / "context.json").read_text())
        other = {**about, "date": "2020-03-01 12:00 UTC", "qkv build": "abi_avx2_fma", "machine": {**about["machine"], "cores": 9}}
        (folder / "context.json").write_text(json.dumps(other))
        for gone in ("peers", "bench_decode"):
            (folder / f"{gone}.json").unlink()
        store.store(folder, self.root / readme.STORED)
        readme.update(page)
        self.assertIsNone(readme.check(page))
        text = page.read_text()
        self.assertTrue(text.startswith("before\n") and text.endswith("after\n"))
        self.assertIn("| | of | AVX2, Test CPU (family 1, model 2) | ", text)  # the newer one first
        both = " | 41.9 ms · 0.7 · 2e-07" * 2
        self.assertIn("| prompt of 2,048 tokens, 8 heads of 128, f32 | multiply-adds" + both + " |", text)
        self.assertIn("| one token on 32,768, 32/8 heads of 128, f32 | bandwidth | – | 8 ms · 0.85 · 2e-07 |", text)
        self.assertIn("9 cores, 200 GFLOP/s", text)
        self.assertEqual(text.count("fastlib by 2x"), 1)
        page.write_text(text.replace("41.9 ms", "11.9 ms"))
        self.assertIn("differ", readme.check(page))


class Running(Folder):
    def test_passes_become_repetitions(self):
        merged = None
        for index in range(3):
            merged = run.add_pass(merged, {"context": {"host_name": "secret"}, "benchmarks": [{"name": "a", "repetition_index": 0}]}, index)
        run.write(self.root / "a.json", merged)
        read = json.loads((self.root / "a.json").read_text())
        self.assertEqual(read["context"], {})
        self.assertEqual([(row["repetition_index"], row["repetitions"]) for row in read["benchmarks"]], [(0, 3), (1, 3), (2, 3)])

    def test_what_is_not_there_is_left_out_with_a_line(self):
        progress = run.Progress(10)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            run.extra([str(self.root / "run")], self.root / "peers.json", progress, "peers", 1, 10)
        self.assertIn("peers: left out, run is not there", said.getvalue())

    def test_a_program_is_read_row_by_row_and_ended_when_the_time_is_up(self):
        program = self.root / "bench"
        program.write_text("""#!/bin/sh
case "$*" in *list_tests*) echo a/n:1; echo a/n:2; exit;; esac
echo "a/n:1   1 ms"
case "$*" in *slow*) exec sleep 60;; *broken*) echo no memory >&2; exit 3;; esac
for a; do case $a in --benchmark_out=*) echo '{"context": {}, "benchmarks": []}' >"${a#*=}";; esac; done
""")
        program.chmod(0o755)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            progress = run.Progress(10)
            self.assertEqual(run.run_program(str(program), [], progress, "bench", 1, 30), ({"context": {}, "benchmarks": []}, None))
            self.assertEqual(run.run_program(str(program), ["broken"], progress, "bench", 1, 30),
                             (None, "ended with status 3: no memory"))
            self.assertEqual(run.run_program(str(program), ["slow"], progress, "bench", 1, 0.3), (None, None))
        self.assertIn("bench: left out, the time was up after 1 of 2 rows", said.getvalue())

    def test_quick_and_full_fit_their_limits(self):
        self.assertLessEqual(plan.QUICK.limit, 180)
        self.assertLessEqual(plan.FULL.limit, 1800)


if __name__ == "__main__":
    unittest.main()
