"""What `deebert bench` measures with: statistics, scripted exits, workloads, counted work, and one small run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deebert.cost import ModelShape, mean_exit_layer
from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH, OffRampAnswer
from deebert.packing import PackedTokens
from jobs.bench import BenchJob, _quick, _settings, _workload
from jobs.benchmarks import results, rivals, roofline
from jobs.benchmarks.contenders import Outcome, Packed, Shared, every_kth
from jobs.benchmarks.pipeline_suite import EnginesAlone, own_device, rate_after_start
from jobs.benchmarks.profiles import ScriptedExits, nobody_leaves, shares_with_mean
from jobs.benchmarks.side_by_side import SideBySide
from jobs.benchmarks.timing import Spread, paired_ratios, take_turns
from jobs.benchmarks.workload import SHAPES, draw_lengths, prepare, random_checkpoint
from jobs.cli import main
from pipeline.engine import Exits
from pipeline.engine.batch import SampleBatch
from pipeline.engine.runner import Runner, Step
from tests.conftest import make_model, make_tokenizer


class TestStatistics:
    def test_median_range_and_interquartile_spread(self) -> None:
        spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])

        assert (spread.median, spread.least, spread.most) == (3.0, 1.0, 5.0)
        assert spread.spread == pytest.approx((4.0 - 2.0) / 3.0)
        assert spread.values == (4.0, 1.0, 3.0, 2.0, 5.0)

    def test_one_value_has_no_spread(self) -> None:
        assert Spread.of([2.5]).spread == 0.0

    def test_ratios_are_taken_round_by_round(self) -> None:
        # A machine that halves its speed in round 2 slows both: the ratio does not see it.
        slow, fast = Spread.of([2.0, 4.0, 2.2]), Spread.of([1.0, 2.0, 1.1])

        assert paired_ratios(slow, fast).values == pytest.approx((2.0, 2.0, 2.0))

    def test_contenders_take_turns_and_warm_up_uncounted(self) -> None:
        calls: list[str] = []

        def contender(name: str) -> Callable[[], int]:
            return lambda: calls.append(name) or len(calls)  # type: ignore[func-returns-value]

        timed = take_turns({"a": contender("a"), "b": contender("b")}, repetitions=3, warm_up=1)

        assert calls == ["a", "b"] * 4
        assert len(timed["a"].seconds.values) == 3
        assert timed["b"].outcome == 8


def undecided(samples: int) -> OffRampAnswer:
    return OffRampAnswer(logits=torch.zeros(samples, 2), entropy=torch.zeros(samples))


class TestScriptedExits:
    @pytest.mark.parametrize("mean", [1.5, 3.0, 6.5, 9.0, 11.5])
    def test_shares_have_the_mean_asked_for_and_reach_every_layer(self, mean: float) -> None:
        shares = shares_with_mean(mean, 12)

        assert shares.sum() == pytest.approx(1.0)
        assert mean_exit_layer([0, *shares.tolist()]) == pytest.approx(mean, abs=1e-9)
        assert (shares > 0).all()

    def test_the_middle_is_uniform(self) -> None:
        np.testing.assert_allclose(shares_with_mean(6.5, 12), 1 / 12, atol=1e-9)

    @pytest.mark.parametrize("mean", [1.0, 12.0, 13.0])
    def test_a_mean_that_no_profile_has_is_refused(self, mean: float) -> None:
        with pytest.raises(ValueError, match="no profile of 12 layers"):
            shares_with_mean(mean, 12)

    def test_shares_must_add_up(self) -> None:
        with pytest.raises(ValueError, match="sum of 1"):
            ScriptedExits([0.5, 0.4])

    def test_a_quarter_leaves_whatever_the_batches(self) -> None:
        policy = ScriptedExits([0.25, 0.75])
        leaves = [policy.fires(1, undecided(n)) for n in (1, 2, 5, 4, 3, 1)]

        assert torch.cat(leaves).tolist() == [False, True, False, False] * 4

    def test_later_shares_are_of_all_samples(self) -> None:
        policy = ScriptedExits([0.5, 0.25, 0.25])

        assert int(policy.fires(1, undecided(8)).sum()) == 4
        assert int(policy.fires(2, undecided(4)).sum()) == 2


SAMPLES = 300


@pytest.fixture(scope="module")
def packed() -> Callable[..., Packed]:
    model = make_model("bert", "mean")
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 33, SAMPLES)
    tokens = PackedTokens.pack([rng.integers(5, 60, n).tolist() for n in lengths])
    encoder = PackedEncoder.of(model)

    def make(shares: object = None, **options: object) -> Packed:
        policy = (lambda: FULL_DEPTH) if shares is None else (lambda: ScriptedExits(shares))  # type: ignore[arg-type]
        return Packed(encoder=encoder, tokens=tokens, micro_batch_tokens=256, make_policy=policy, **options)  # type: ignore[arg-type]

    return make


class TestContenders:
    @pytest.mark.parametrize("under_way", [None, 2, 5])
    @pytest.mark.parametrize("regroups", [True, False])
    def test_the_scripted_histogram_comes_out(
        self, packed: Callable[..., Packed], regroups: bool, under_way: int | None
    ) -> None:
        outcome = packed([0.2, 0.2, 0.0, 0.2, 0.4], regroups=regroups, under_way=under_way)()

        histogram = np.bincount(outcome.exit_layers, minlength=6)[1:]  # type: ignore[arg-type]
        np.testing.assert_allclose(histogram, np.array([0.2, 0.2, 0.0, 0.2, 0.4]) * SAMPLES, atol=1)

    def test_exits_do_the_work_of_their_layers_and_no_more(self, packed: Callable[..., Packed]) -> None:
        run = packed([0.5, 0.0, 0.0, 0.0, 0.5])
        outcome = run()

        lengths = run.tokens.layout.lengths
        assert outcome.layer_tokens == int((lengths * outcome.exit_layers).sum())
        assert outcome.layer_squared_tokens == int((lengths**2 * outcome.exit_layers).sum())

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_side_by_side_is_the_same_work(self, packed: Callable[..., Packed], k: int) -> None:
        alone = packed()
        parts = [dataclasses.replace(alone, tokens=every_kth(alone.tokens, i, k)) for i in range(k)]
        with SideBySide(k, threads=1) as replicas:
            together, outcome = Shared(parts=parts, together=replicas)(), alone()

        assert np.array_equal(together.predictions, outcome.predictions)
        assert np.array_equal(together.exit_layers, outcome.exit_layers)  # type: ignore[arg-type]
        assert together.layer_tokens == outcome.layer_tokens
        assert together.layer_squared_tokens == outcome.layer_squared_tokens
        assert together.off_ramp_samples == outcome.off_ramp_samples

    def test_shrinking_takes_more_steps_for_the_same_work(self, packed: Callable[..., Packed]) -> None:
        shares = shares_with_mean(3.0, 5).tolist()
        regrouping, shrinking = packed(shares)(), packed(shares, regroups=False)()

        assert shrinking.layer_tokens == pytest.approx(regrouping.layer_tokens, rel=0.02)
        assert shrinking.steps > 1.3 * regrouping.steps

    @pytest.mark.parametrize(("under_way", "most"), [(None, 1), (2, 2)])
    def test_shrinking_has_as_many_micro_batches_under_way_as_regrouping(
        self,
        packed: Callable[..., Packed],
        monkeypatch: pytest.MonkeyPatch,
        under_way: int | None,
        most: int,
    ) -> None:
        start, finish, running = Runner.start, Runner.finish, [0]

        def counting(runner: Runner, *given: Any) -> Step:
            running.append(running[-1] + 1)
            return start(runner, *given)

        def counting_down(runner: Runner, *given: Any) -> tuple[Exits, SampleBatch | None]:
            running.append(running[-1] - 1)
            return finish(runner, *given)

        monkeypatch.setattr(Runner, "start", counting)
        monkeypatch.setattr(Runner, "finish", counting_down)
        packed(shares_with_mean(3.0, 5).tolist(), regroups=False, under_way=under_way)()

        assert (max(running), running[-1]) == (most, 0)

    def test_nobody_leaves_costs_every_off_ramp(self, packed: Callable[..., Packed]) -> None:
        full, nobody = packed()(), packed(nobody_leaves(5).tolist())()

        assert nobody.layer_tokens == full.layer_tokens
        assert (full.off_ramp_samples, nobody.off_ramp_samples) == (SAMPLES, 5 * SAMPLES)
        assert np.array_equal(nobody.predictions, full.predictions)

    @pytest.mark.parametrize("sort", [True, False])
    def test_padded_transformers_give_the_same_labels(
        self, packed: Callable[..., Packed], sort: bool
    ) -> None:
        ours = packed()
        model = make_model("bert", "mean")
        rival = rivals.Padded(
            classify=rivals.transformers_classifier(model, device=torch.device("cpu"), dtype=torch.float32),
            tokens=ours.tokens,
            batch_size=32,
            sort_by_length=sort,
            num_layers=5,
            padding_id=0,
        )
        theirs = rival()

        assert np.array_equal(theirs.predictions, ours().predictions)
        lengths = ours.tokens.layout.lengths
        order = np.sort(lengths) if sort else lengths
        padded = [len(part) * part.max() for part in np.split(order, range(32, SAMPLES, 32))]
        assert theirs.layer_tokens == 5 * sum(padded)
        assert theirs.layer_tokens > 5 * lengths.sum()

    def test_work_is_counted_in_flops(self) -> None:
        shape = ModelShape(num_layers=2, hidden_size=4, intermediate_size=8, num_labels=2)
        outcome = Outcome(
            predictions=np.zeros(1, np.int64),
            layer_tokens=10,
            layer_squared_tokens=50,
            off_ramp_samples=3,
            steps=2,
        )

        # 2 · tokens · (4·16 + 2·4·8) + 4 · Σ length² · 4, and 2 · 3 · 4 · (4 + 2) for the off-ramps.
        assert outcome.encoder_flops(shape) == 2 * 10 * 128 + 4 * 50 * 4
        assert outcome.work(shape)["flops"] == 3360 + 144


class TestRivals:
    @pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
    def test_an_exported_graph_gives_our_logits(self, library: str, tmp_path: Path) -> None:
        pytest.importorskip("onnx", reason="needs pip install '.[bench]'")
        pytest.importorskip(library, reason="needs pip install '.[bench]'")
        model = make_model("bert", "mean", num_layers=2)
        tokens = PackedTokens.pack([[5, 6, 7, 8], [9, 10], [11, 12, 13]])
        ids, mask = rivals.pad(tokens, np.arange(3), 0)
        exact = rivals.transformers_classifier(model, device=torch.device("cpu"), dtype=torch.float32)
        path = rivals.export_onnx(model, tmp_path)
        theirs = (
            rivals.onnxruntime_classifier(path, threads=1)
            if library == "onnxruntime"
            else rivals.openvino_classifiers(path, threads=1, streams=1, precision="float32")[0]
        )

        np.testing.assert_allclose(theirs(ids, mask), exact(ids, mask), atol=1e-4)

    def test_padding(self) -> None:
        ids, mask = rivals.pad(PackedTokens.pack([[5, 6], [7], [8, 9, 10]]), np.array([2, 1]), 0)

        assert ids.tolist() == [[8, 9, 10], [7, 0, 0]]
        assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]

    def test_an_absent_library_is_named_with_the_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rivals, "find_spec", lambda name: None)

        assert "pip install" in str(rivals.missing("openvino", torch.device("cpu")))
        assert rivals.missing("transformers", torch.device("cpu")) is None


class TestWorkload:
    @pytest.mark.parametrize(
        ("kind", "mean", "within"), [("short", 25, 0.5), ("long", 230, 3), ("128", 128, 0)]
    )
    def test_lengths_are_like_the_corpus(self, kind: str, mean: float, within: float) -> None:
        lengths = draw_lengths(kind, 20_000, longest=512, seed=0)

        assert lengths.mean() == pytest.approx(mean, abs=within)
        assert 3 <= lengths.min() <= lengths.max() <= 512

    def test_random_texts_have_the_lengths_drawn(self) -> None:
        work = prepare("tiny", texts=None, lengths="short", samples=50, max_length=20, seed=3)

        drawn = draw_lengths("short", 50, longest=20, seed=3)
        assert work.tokens.layout.lengths.tolist() == drawn.tolist()
        assert work.tokens.input_ids.min() >= 2  # nothing is padding or unknown
        assert work.shape == ModelShape(num_layers=4, hidden_size=32, intermediate_size=64, num_labels=2)

    def test_the_same_seed_gives_the_same_weights_and_texts(self) -> None:
        one, two = (
            prepare("tiny", texts=None, lengths="short", samples=5, max_length=None, seed=1) for _ in "12"
        )

        assert one.texts == two.texts
        assert torch.equal(
            one.checkpoint.model.final_classifier.dense.weight,
            two.checkpoint.model.final_classifier.dense.weight,
        )

    def test_shapes_are_the_published_ones(self) -> None:
        model = random_checkpoint("e5-small", seed=0, num_layers=1).model
        layer = sum(p.numel() for p in model.backbone.encoder.layer.parameters())

        h, i = SHAPES["e5-small"][1], SHAPES["e5-small"][3]
        assert layer == 4 * (h * h + h) + 2 * h * i + h + i + 4 * h


class TestPipelineSuite:
    def test_engines_alone_answer_every_text_once(self) -> None:
        job = _quick(BenchJob(quick=True, samples=31, precision="float32", device="cpu"))
        work = _workload(job)
        with SideBySide(2, threads=1) as replicas:
            alone = EnginesAlone(workload=work, settings=_settings(job, work.checkpoint), together=replicas)

            assert alone() == 31

    def test_engines_alone_have_a_gpu_each(self) -> None:
        assert [str(own_device(torch.device("cuda"), i)) for i in (0, 1)] == ["cuda:0", "cuda:1"]
        assert [str(own_device(torch.device("cpu"), i)) for i in (0, 1)] == ["cpu", "cpu"]

    def test_start_up_is_taken_off_only_where_it_can_be_told(self) -> None:
        whole, start = Spread.of([30.0, 31.0, 32.0]), Spread.of([10.0, 11.0, 12.0])

        assert rate_after_start(whole, start, 100) == pytest.approx(5.0)
        assert rate_after_start(start, whole, 100) is None
        assert rate_after_start(Spread.of([13.0, 14.0]), Spread.of([11.0, 12.5]), 100) is None


def test_products_count_their_flops() -> None:
    shape = ModelShape(num_layers=2, hidden_size=32, intermediate_size=64, num_labels=2)
    alone = SideBySide(1, threads=1)
    products = roofline.products(shape, 16, device=torch.device("cpu"), dtype=torch.float32, together=alone)

    # A layer's products are its FLOPs less those of attention.
    assert products["layer"].flops == shape.layer_flops(16, 0)
    assert products["large"].flops == 2 * 2048**3


def test_results_are_never_replaced(tmp_path: Path) -> None:
    result = {
        "suite": "engine",
        "workload": {"model": "tiny"},
        "settings": {"device": "cpu", "precision": "float32"},
    }
    first, second = results.write(result, tmp_path), results.write(result, tmp_path)

    assert first.name.endswith("-bench-engine-tiny-cpu-float32.json")
    assert second.name.endswith("-float32-2.json")


def test_quick_leaves_what_was_asked_for() -> None:
    job = _quick(BenchJob(samples=7, quick=True))

    assert (job.model, job.samples, job.repetitions) == ("tiny", 7, 1)


class TestCommand:
    def test_a_quick_run_ends_in_a_line_of_json(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--quick", "--threads", "1", "--precision", "float32", "--rivals", "transformers"]

        assert main(["bench", *words, "--device", "cpu", "--output", str(tmp_path)]) == 0

        out = capsys.readouterr().out
        result = json.loads(out.splitlines()[-1])
        assert json.loads(Path(result.pop("path")).read_text()) == result
        assert result["machine"]["libraries"]["torch"] == torch.__version__
        assert result["command"][:3] == ["deebert", "bench", "--quick"]
        engine = result["suites"]["engine"]
        names = [row["name"] for row in engine["contenders"]]
        assert names == [
            "transformers float32, input order",
            "transformers float32, length-sorted",
            "ours, full depth @256",
            "ours, nobody leaves @256",
            "ours, mean 2, regrouping @256",
            "ours, mean 2, shrinking @256",
        ]
        assert {row["name"] for row in engine["skipped"]} == {"onnxruntime", "openvino"}
        for row in engine["contenders"]:
            assert len(row["seconds"]["values"]) == 1
            assert row["work"]["layer_tokens"] > 0
            assert row["label_agreement"] is None  # random weights
        nobody, regrouping, _ = engine["savings"]
        assert nobody["times_fewer_layer_tokens"] == 1.0
        assert regrouping["mean_exit_layer"] == pytest.approx(2.0, abs=0.1)
        assert engine["roofline"]["layer_gemm_gflops"] > 0

    def test_real_weights_are_held_to_float32(
        self, saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = tmp_path / "texts.jsonl"
        texts.write_text("\n".join(json.dumps({"text": "the film was good " * n}) for n in range(1, 9)))
        words = ["--quick", "--threads", "1", "--precision", "float32", "--rivals", "none", "--device", "cpu"]
        where = ["--model", str(saved_model), "--texts", str(texts), "--output", str(tmp_path)]

        assert main(["bench", *words, *where, "--entropy-threshold", "1.0"]) == 0

        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows = {row["name"]: row for row in result["suites"]["engine"]["contenders"]}
        assert rows["ours, full depth @256"]["label_agreement"] == 1.0
        assert rows["ours, own, regrouping @256"]["work"]["mean_exit_layer"] < 5
        assert result["workload"]["weights"] == "trained"

    def test_distilbert_is_measured_like_any_other(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_model("distilbert").save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        (tmp_path / "texts.txt").write_text("the film was good\n" * 8)
        words = ["--quick", "--threads", "1", "--precision", "float32", "--rivals", "none", "--device", "cpu"]
        where = ["--model", str(tmp_path / "model"), "--texts", str(tmp_path / "texts.txt")]

        assert main(["bench", *words, *where, "--output", str(tmp_path)]) == 0

        assert json.loads(capsys.readouterr().out.splitlines()[-1])["workload"]["intermediate_size"] == 48

    def test_a_mean_that_a_shallow_model_cannot_have_is_left_out(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--quick", "--threads", "1", "--precision", "float32", "--rivals", "none", "--device", "cpu"]

        assert main(["bench", *words, "--mean-exit-layers", "3,9", "--output", str(tmp_path)]) == 0

        out = capsys.readouterr().out
        rows = json.loads(out.splitlines()[-1])["suites"]["engine"]["contenders"]
        assert [row["profile"] for row in rows] == [None, "nobody", "mean 3", "mean 3"]
        assert "left out: ours, mean 1 (no profile of 4 layers has this mean exit layer)\n" in out

    @pytest.mark.parametrize(
        "precision",
        [
            "float32",
            pytest.param(
                "int8",
                marks=pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI"),
            ),
        ],
    )
    def test_what_training_costs(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
    ) -> None:
        words = ["--quick", "--threads", "1", "--precision", precision, "--device", "cpu"]

        assert main(["bench", *words, "--suite", "training", "--output", str(tmp_path)]) == 0

        out = capsys.readouterr().out
        suite = json.loads(out.splitlines()[-1])["suites"]["training"]
        trainer, stage_1, stage_2 = suite["contenders"]
        assert trainer["name"] == "Trainer, an epoch"
        assert trainer["of_trainer"]["median"] == stage_1["of_stage_1"]["median"] == 1.0
        of_stage_1 = stage_2["seconds"]["median"] / stage_1["seconds"]["median"]
        assert stage_2["of_stage_1"]["median"] == pytest.approx(of_stage_1, rel=1e-3)
        assert "| of stage 1 % |" in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "no/such/folder", "--texts", "TEXTS"], "no such model folder"),
            (["--model", "MODEL"], "give it texts with --texts FILE"),
            (["--rivals", "tensorrt"], "unknown rival 'tensorrt'"),
            (["--lengths", "medium"], "neither short, long nor a number of tokens"),
            (["--mean-exit-layers", "0.5"], "mean exit layers between 1 and 12"),
        ],
    )
    def test_misuse_is_one_sentence(
        self,
        words: list[str],
        message: str,
        saved_model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        texts = tmp_path / "texts.txt"
        texts.write_text("the film was good\n")
        places = {"MODEL": str(saved_model), "TEXTS": str(texts)}

        assert main(["bench", "--quick", *(places.get(word, word) for word in words)]) == 2
        assert message in capsys.readouterr().err
