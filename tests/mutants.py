"""`make mutants`: does a test notice? One-line bugs, planted one at a time in a copy of the tree, and the
tests that should fail.

    python tests/mutants.py [--jobs 2] [WORD ...]          # only mutants whose name or file has one of the words

A mutant whose text is no longer in its file is an error of this list, as is one that survives without an
explanation. Kernel mutants that the interpreter judges without pytest are in tests/kernels/test_mutants.py,
which runs here too.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "tests/kernels/test_mutants.py"
TIMEOUT_S = 600
NOT_COPIED = (
    ".git",
    ".venv*",
    "runs",
    "data-cache",
    "__pycache__",
    ".*_cache",
    "*.egg-info",
    "build",
    "dist",
    "site",
    ".hypothesis",
)

ORACLE = "tests/parallel/test_oracle.py"
LOSS, OPTIM_OPTIONS, DATA, REST = (
    f"{ORACLE}::test_every_option_changes_the_run_as_the_oracle_says[{group}]"
    for group in ("loss", "optim", "data", "rest")
)
LAYOUT = f"{ORACLE}::test_a_layout_trains_as_the_oracle"
BASES = f"{ORACLE}::test_a_base_model_trains_as_the_oracle"
FAMILIES, POOLINGS = "tests/model/test_families.py", "tests/model/test_pooling.py"
MORE = f"{ORACLE}::test_more_cases_of_a_layout_train_as_the_oracle"
ONE, TP2, TP2_SP, DP2, HSDP = (
    f"{LAYOUT}[{name}] {MORE}[{name}]"
    for name in ("tp1-dp1", "tp2-dp1", "tp2+sp-dp1", "tp1-dp2", "tp1-dp2-replicate2")
)
BF16, WIRE = "tests/parallel/test_bf16.py", "tests/parallel/test_wire.py"
RECOMPUTE = "tests/parallel/test_recompute.py"
LORA = "nemo_embed_core/model/lora.py"
ADAPTER, WEIGHTS = (f"nemo_embed_core/checkpoint/{name}.py" for name in ("adapter", "weights"))
TEST_LORA, LORA_ORACLE = (
    "tests/train/test_lora.py",
    f"{ORACLE}::test_lora_trains_as_the_projection_of_a_dense_run",
)
DROPOUT, DROPOUT_ORACLE = (
    "kernels/dropout_linear.py",
    f"{ORACLE}::test_dropout_of_lora_is_the_oracles_in_every_layout",
)
MASTERS, MOMENTS = "tests/train/test_master_weights.py", "tests/train/test_moments.py"


class Mutant(NamedTuple):
    name: str  # what goes wrong
    file: str
    old: str
    new: str
    tests: str  # what should notice, as pytest takes it
    no_bug: str = ""  # why nothing has to notice


PRINCIPAL, TURNED = "nemo_embed_core/train/principal_axes.py", "nemo_embed_core/checkpoint/turned_axes.py"
TEST_AXES = "tests/train/test_init_axes.py"
CONTRASTIVE, OBJECTIVE, DISTILL, GRADED = (
    f"nemo_embed_core/loss/{name}.py" for name in ("contrastive", "objective", "distill", "graded")
)
TEST_GRADED = "tests/loss/test_graded.py"
TEACHER, TEACHER_VECTORS = "tests/train/test_teacher_vectors.py", "nemo_embed_core/data/teacher_vectors.py"
STEP = "nemo_embed_core/train/step.py"
OPTIM, SCHEDULE = (f"nemo_embed_core/train/{name}.py" for name in ("optim", "schedule"))
ENGINE, TRAINER, PREFETCH, RUN_STATE, LEARNED = (
    f"nemo_embed_core/train/{name}.py" for name in ("engine", "trainer", "prefetch", "run_state", "learned")
)
EVALUATION, DEV_TESTS = "nemo_embed_core/train/evaluate.py", "tests/train/test_evaluate.py"
GRAD_NORM, FSDP = "nemo_embed_core/parallel/grad_norm.py", "nemo_embed_core/parallel/fsdp.py"
COLLECTIVES, LAYERS = "nemo_embed_core/parallel/collectives.py", "nemo_embed_core/parallel/layers.py"
FP8, TEST_FP8 = "nemo_embed_core/parallel/fp8.py", "tests/parallel/test_fp8.py"
TEST_GATHER = (
    "tests/parallel/test_fp8_gather.py::test_weights_gathered_in_fp8_give_the_bits_of_those_gathered_in_bf16"
)
LLAMA, ATTENTION, POOLING = (f"nemo_embed_core/model/{name}.py" for name in ("llama", "attention", "pooling"))
PACKING, BINS, SAMPLER, MIX, POPULATION = (
    f"nemo_embed_core/data/{name}.py" for name in ("packing", "bins", "sampler", "mix", "population")
)
NEAR, OVERLAP, PAGE = (f"nemo_embed_core/data/{name}.py" for name in ("near", "overlap", "inspect_page"))
INSPECT = "tests/data/test_inspect.py"
SHAPES = "nemo_embed_core/data/shapes.py"
COLUMNAR, COMPILE = "nemo_embed_core/data/columnar.py", "nemo_embed_core/data/compile.py"
SELECTION, POOL = (f"nemo_embed_core/mine/{name}.py" for name in ("selection", "pool"))
TOPK, CANDIDATES, STREAMING, BOUNDS = (
    f"nemo_embed_core/mine/search/{name}.py" for name in ("topk", "candidates", "streaming", "bounds")
)
MANIFEST, RUNS = "nemo_embed_core/checkpoint/manifest.py", "nemo_embed_core/checkpoint/runs.py"
SAVER, AVERAGE = "nemo_embed_core/checkpoint/saver.py", "nemo_embed_core/merge/average.py"
SERVING, FAULTS, TEST_SERVING = (
    "nemo_embed_core/export/serving.py",
    "nemo_embed_core/export/faults.py",
    "tests/export/test_serving.py",
)
HUB, TEST_HUB = "nemo_embed_core/export/hub.py", "tests/export/test_hub.py"
MODEL_META = "nemo_embed_core/evaluation/model_meta.py"
TEST_TOPK, TEST_NEGATIVES = "tests/mine/test_topk.py", "tests/mine/test_negatives.py"
TEST_SHARDED, TEST_TRAINER = "tests/checkpoint/test_sharded.py", "tests/train/test_trainer.py"
TEST_PREFETCH, TEST_REHEARSAL = "tests/train/test_prefetch.py", "tests/train/test_rehearsal.py"

MUTANTS = [
    # ---- the loss
    Mutant("in-batch labels of another rank", CONTRASTIVE, "count * (dp_rank * B + torch", "count * (torch", DP2),
    Mutant("in-batch copies of the positive are negatives", CONTRASTIVE, "doc_ids_P=columns.ids_P", "doc_ids_P=None", LOSS),
    Mutant("missing negatives of other rows count", CONTRASTIVE, "valid_P=columns.valid_P", "valid_P=None", LOSS),
    Mutant("documents of other ranks are constants", CONTRASTIVE, "gather_tokens(local, dp_group, dtype)", "gather_tokens(local.detach(), dp_group, dtype)", DP2),
    Mutant("queries of other ranks are constants", CONTRASTIVE, "gather_tokens(groups.q_BD, dp_group, dtype)", "gather_tokens(groups.q_BD.detach(), dp_group, dtype)", DP2),
    Mutant("a query stands for any document of its row", CONTRASTIVE, "columns.ids_P[::count]", "columns.ids_P[count - 1 :: count]", "tests/loss/test_contrastive.py"),
    Mutant("a positive is contrasted with its row's own negatives", CONTRASTIVE, "torch.cat([known_BJ, own_BK], 1)", "known_BJ", "tests/loss/test_contrastive.py"),
    Mutant("the margin counts from 0", CONTRASTIVE, "limits_B = positive_B.detach() + loss", "limits_B = 0 * positive_B.detach() + loss", "tests/loss/test_contrastive.py"),
    Mutant("own negatives above the margin count", CONTRASTIVE, "negative_BK & (own_scores(q_BD, docs_BMD[:, 1:]) <= limits_B[:, None])", "negative_BK", "tests/loss/test_contrastive.py"),
    Mutant("further terms are not relative to the positive", CONTRASTIVE, "extra_B - positive_B / temperature", "extra_B - positive_B.detach() / temperature", "tests/loss/test_contrastive.py"),
    Mutant("rows without in_batch are not joined", STEP, "loss.couples_rows and len", 'loss.in_batch != "none" and len', DP2),
    Mutant("each rank learns a temperature of its own", LEARNED, "all_reduce_(self.value.grad, dp_group)", "self.value.grad", DP2),
    Mutant("the temperature's gradient is the sum over ranks", LEARNED, ".div_(dp_group.size())", "", DP2),
    Mutant("the temperature learns at the weights' rate", LEARNED, "self._lr * lr / self._peak", "lr", LOSS),
    Mutant("the temperature adds its gradients up over steps", ENGINE, "learned.drop_gradient()\n        beside", "pass\n        beside", LOSS),
    Mutant("a learned temperature leaves its range", LEARNED, "self.value.clamp_(*map(math.log, TEMPERATURE_RANGE))", "pass", "tests/train/test_temperature.py"),
    Mutant("a refused step moves the temperature", LEARNED, "finite.to(self.value.dtype)", "finite.new_ones((), dtype=self.value.dtype)", "tests/train/test_temperature.py"),
    Mutant("a resumed run forgets the temperature's moments", LEARNED, "value.fill_(values[name])", "pass", "tests/train/test_temperature.py"),
    Mutant("a narrow vector is projected by other columns than its own", DISTILL, "projection[:, : rows_BND.shape[-1]]", "projection[:, -rows_BND.shape[-1] :]", LOSS),
    Mutant("slots without a document are far from the teacher", DISTILL, "far_BN.masked_fill(~exists_BN, 0.0).sum(1) / exists_BN.sum(1)", "far_BN.mean(1)", f"{TEACHER} {LOSS}"),
    Mutant("a teacher's vectors are compared in bf16", "nemo_embed_core/loss/distill.py", "groups.docs_BMD], 1).to(projection.dtype)", "groups.docs_BMD], 1).bfloat16().to(projection.dtype)", "tests/parallel/test_bf16.py -k teacher"),
    Mutant("the projection is a constant", OBJECTIVE, "teacher_vectors(groups, projection)", "teacher_vectors(groups, projection.detach() + 0 * projection)", LOSS),
    Mutant("the projection decays as the weights", LEARNED, "weight_decay=0.0", "weight_decay=0.3", LOSS),
    Mutant("the projection is written by every shard", RUN_STATE, "if plain == PROJECTION and self.engine.mesh.rank:", "if plain == PROJECTION and self.engine.mesh.tp.rank:", TEACHER),
    Mutant("a resumed run forgets the projection's updates", RUN_STATE, 'projection.moments["step"].fill_(reader.manifest["teacher_vectors"]["updates"])', "pass", TEACHER),
    Mutant("one teacher's folder serves every dataset", TEACHER_VECTORS, "getattr(self.vectors[dataset], side).find", "getattr(self.vectors[0], side).find", "tests/data/test_teacher_vectors.py"),
    Mutant("keys of other shards are taken", "nemo_embed_core/data/vectors.py", 'proof is None or proof.get("texts") != [sidecar["texts"] for sidecar in sidecars]', "proof is None", "tests/data/test_teacher_vectors.py"),
    Mutant("own documents are scored in bf16", CONTRASTIVE, "return run if in_batch else torch.promote_types(run, torch.float32)", "return run", "tests/loss"),
    Mutant("in-batch rows are scored in fp32, and timed in bf16", CONTRASTIVE, "gather_tokens(local, dp_group, dtype)", "gather_tokens(local, dp_group)", "tests/kernels/test_benchmark.py -k training"),
    Mutant("missing slots count in the accuracy", CONTRASTIVE, "(exists & (scores >= positive[:, None]))", "(scores >= positive[:, None])", f"tests/loss {ORACLE}"),
    Mutant("rows without a candidate count as hits", CONTRASTIVE, "(ranked & ~outranked).sum()", "(~outranked).sum()", f"tests/loss {ORACLE}"),
    Mutant("known positives of the batch are negatives", CONTRASTIVE, "known_ids_BJ=known_BJ", "known_ids_BJ=None", ORACLE),
    Mutant("known positives among the row's own are negatives", CONTRASTIVE, "self.mask_BM[:, 1:] & ~self.is_right(self.ids_BM[:, 1:])", "self.mask_BM[:, 1:]", f"tests/loss {ORACLE}"),
    Mutant("known positives of a micro-batch instead of the batch", PACKING, "pad_to_multiple, known_BJ[bin_], most", "pad_to_multiple, None, most", f"tests/data/test_packing.py {ORACLE}"),
    Mutant("missing slots count in the negatives' similarity", CONTRASTIVE, "negatives = scores.masked_fill(~exists, 0.0).sum()", "negatives = scores.sum()", "tests/loss"),
    Mutant("a temperature that never arrives", OBJECTIVE, "loss.temperature if log_temperature is None", "0.02 if log_temperature is None", LOSS),
    Mutant("in-batch mode that never arrives", CONTRASTIVE, "count = max(1, num_documents)", "count = 1", LOSS),
    Mutant("the teacher's scores are divided by the student's temperature", OBJECTIVE, "kl(groups, temperature, loss.kl_temperature)", "kl(groups, temperature, loss.temperature)", "tests/loss/test_distill.py"),
    Mutant("documents without a score are distilled", DISTILL, "& groups.teacher_BM.isfinite()", "", "tests/loss/test_distill.py"),
    Mutant("negatives that are right are distilled", DISTILL, "torch.cat([groups.mask_BM[:, :1], groups.negative_BK], 1)", "groups.mask_BM", "tests/loss/test_distill.py"),
    Mutant("margins are summed", DISTILL, "kept_BM[:, 1:].sum(1).clamp(min=1)", "1", "tests/loss/test_distill.py"),
    Mutant("a term is logged as a mean over rows that lack it", OBJECTIVE, 'totals.get("scored_rows", 0.0)) for term', 'totals["rows"]) for term', "tests/loss/test_distill.py"),
    Mutant("scores move to other documents where a text stands twice", COMPILE, "found.setdefault(doc_id, score)", "found[doc_id] = score", "tests/data/test_scores.py"),
    Mutant("scores move where a negative is left out", "nemo_embed_core/data/judge.py", '"negative_scores.npy": scores_N[kept_N]', '"negative_scores.npy": scores_N[: kept_N.sum()]', "tests/data/test_scores.py"),
    Mutant("scores of a batch are those of other rows", "nemo_embed_core/data/store.py", "scores_BM[row[entry], column + (columns.start or 0)] = scores[at[entry]]", "scores_BM[row[entry], column + (columns.start or 0)] = scores[entry]", "tests/data/test_scores.py"),
    Mutant("the document of a graded pair is right", "nemo_embed_core/data/judge.py", "np.isnan(grades_R)[row_P]", "row_P >= 0", "tests/data/test_scores.py"),
    Mutant("a loss without its scores goes unseen", "nemo_embed_core/train/preflight.py", "        _check_scores(config, store)\n", "", "tests/data/test_scores.py"),
    Mutant("the first layers are kept, whichever are named", "nemo_embed_core/checkpoint/kept_layers.py", "self._layers[int(number)]", "int(number)", "tests/train/test_init_layers.py"),
    Mutant("axes are those of vectors behind a final norm that the turned model has not", PRINCIPAL, "local_tensor(parameter).fill_(1.0)", "pass", TEST_AXES),
    Mutant("the first columns hold the least", PRINCIPAL, "rising.flip(1)", "rising", TEST_AXES),
    Mutant("each rank turns by its own texts", PRINCIPAL, "    all_reduce_(sum_DD, mesh.dp_group)\n", "", TEST_AXES),
    Mutant("a missing negative counts as a text", PRINCIPAL, "texts.docs_BMD[texts.mask_BM]", "texts.docs_BMD.flatten(0, 1)", TEST_AXES),
    Mutant("what adds to the residual is turned back", TURNED, "self._axes_DD[:, first : first + rows].T", "self._axes_DD[first : first + rows]", TEST_AXES),
    Mutant("a norm's weights are lost", TURNED, "(weights_D / _size(weights_D))[:, None] * right_DD", "right_DD", TEST_AXES),
    Mutant("a norm's size moves into the matrix behind it", TURNED, "    return weights_D.square().mean().sqrt()", "    return weights_D.square().mean().sqrt() * 0 + 1", TEST_AXES),
    Mutant("norms of heads are made equal", TURNED, 'name.endswith((*HEAD_NORMS, ".bias"))', 'name.endswith(".bias")', TEST_AXES),
    Mutant("the second part of a matrix is the first", TURNED, "((first + start, 0), (count, width))", "((first, 0), (count, width))", TEST_AXES),
    Mutant("a run of turned axes goes on as one of its own", "nemo_embed_core/train/same_run.py", '("init_axes", "own")', '("init_layers", [])', TEST_AXES),
    Mutant("pairs of equal grades are ordered", GRADED, "grade[:, None] > grade[None, :]", "grade[:, None] >= grade[None, :]", TEST_GRADED),
    Mutant("cosines of other ranks are constants", GRADED, "gather_tokens(own_B, dp_group)", "gather_tokens(own_B.detach(), dp_group) + own_B.sum() - own_B.sum().detach()", TEST_GRADED),
    Mutant("the lower grade wants the higher cosine", GRADED, "(s[None, :] - s[:, None])", "(s[:, None] - s[None, :])", TEST_GRADED),
    Mutant("graded pairs count as rows that lack a candidate", OBJECTIVE, 'totals["rows"] - graded - totals["ranked_rows"]', 'totals["rows"] - totals["ranked_rows"]', TEST_GRADED),
    Mutant("graded pairs are positives", OBJECTIVE, "losses_B.masked_fill(_is_graded(groups), 0.0)", "losses_B", TEST_GRADED),
    Mutant("graded pairs of a micro-batch alone are compared", STEP, "loss.couples_rows and len", "loss.has_in_batch and len", TEST_GRADED),
    Mutant("graded pairs without a negative are left out", POPULATION, "lone &= np.isnan(store.row_grades)", "pass", TEST_GRADED),
    Mutant("cut rows are not normalised", "nemo_embed_core/model/pooling.py", "unit(rows[..., :dim].to(wide))", "rows[..., :dim]", "tests/loss/test_contrastive.py"),
    Mutant("weights of widths never arrive", OBJECTIVE, "factor = weight * own_weight", "factor = own_weight", "tests/loss/test_contrastive.py"),
    Mutant("a width is logged with its weight", OBJECTIVE, "sums.append(losses_B.detach().double()", "sums.append(losses[-1].detach().double()", "tests/loss/test_contrastive.py"),
    Mutant("a model forgets its widths", "nemo_embed_core/checkpoint/source.py", 'if name != "dims" or entry}', 'if name != "dims"}', "tests/evaluation/test_encoders.py"),
    Mutant("cut vectors are not normalised", "nemo_embed_core/encoders/embedder.py", "cut_rows(rows, self.dim)", "rows[:, : self.dim]", "tests/evaluation/test_encoders.py"),
    Mutant("mean over the micro-batch instead of the batch", STEP, "(losses_B.sum() / rows).backward()", "losses_B.mean().backward()", DP2),
    Mutant("GradCache forgets the first micro-batch", STEP, "with_graph.backward(e.grad)", "with_graph.backward(e.grad * min(i, 1))", LOSS),
    Mutant("a reduce-scatter after every micro-batch", FSDP, "set_requires_gradient_sync(is_last or not whole)", "set_requires_gradient_sync(True)", WIRE),
    Mutant("an all-gather for every micro-batch", FSDP, "set_reshard_after_backward(is_last or not whole)", "set_reshard_after_backward(True)", WIRE),
    Mutant("a sum over copies after every micro-batch", FSDP, "set_requires_all_reduce(is_last)", "set_requires_all_reduce(True)", WIRE),
    # ---- LoRA
    Mutant("alpha / rank never arrives", LORA, "alpha=self.scale)", "alpha=1.0)", f"{TEST_LORA} {LORA_ORACLE}"),
    Mutant("tp ranks keep shares of a row-parallel h", LORA, "(copy_to_tp if self.is_column else reduce_from_tp)", "copy_to_tp", LORA_ORACLE),
    Mutant("the gradient of a column-parallel h is a share", LORA, "(copy_to_tp if self.is_column else reduce_from_tp)", "(type(h_TR).clone if self.is_column else reduce_from_tp)", LORA_ORACLE),
    Mutant("a tp rank's columns have the masks of the first's", LORA, "0 if self.is_column else self.tp.rank * columns", "0", DROPOUT_ORACLE),
    Mutant("tokens of a tp rank have the masks of the first's", LORA, "self.tp.rank * tokens if self.is_column and self.tp.sequence_parallel else 0", "0", DROPOUT_ORACLE),
    Mutant("each step has the masks of the first", TRAINER, "        self.engine.step = self.step\n", "", DROPOUT_ORACLE),
    Mutant("what dropout keeps is not scaled", DROPOUT, "x_TI * (1 / (1 - rate))", "x_TI", f"{DROPOUT_ORACLE} {TEST_LORA}"),
    Mutant("a block's layers have one mask", LORA, "enumerate(linear)", "((int(n.split('.')[2]), (n, m)) for n, m in linear)", DROPOUT_ORACLE),
    Mutant("a text is named by its length", DROPOUT, "_hash(_hash(0, position_ids_T), input_ids_T.long())", "_hash(0, position_ids_T + 0 * input_ids_T.long())", DROPOUT_ORACLE),
    Mutant("vectors are encoded with dropout", LLAMA, "if self.training and self.dropout_key is not None:", "if self.dropout_key is not None:", TEST_LORA),
    Mutant("peft hears of no dropout", "nemo_embed_core/export/peft.py", "dropout = trained.get(\"dropout\", 0.0)", "dropout = 0.0 if trained else 0.0", TEST_LORA),
    Mutant("the base of LoRA is trained too", LORA, "    model.requires_grad_(False)\n", "", f"{TEST_LORA} {LORA_ORACLE}"),
    Mutant("a column-parallel factor is cut by equal rows", LORA, "cut_B, layer.unit)", "cut_B)", LORA_ORACLE),
    Mutant("the whole factors' gradients are of a rank's tokens", GRAD_NORM, "if mesh.tp.sequence_parallel or getattr(module", "if getattr(module", LORA_ORACLE),
    Mutant("a frozen weight's input is gathered again", COLLECTIVES, "x if ctx.needs_input_grad[1] else None, w", "x, w", "tests/plan/test_plan.py -k sends"),
    Mutant("adapters are folded without alpha / rank", ADAPTER, "return self._scale * (B", "return (B", TEST_LORA),
    Mutant("rows of B are stacked as q, k, v", ADAPTER, "row + low - start : row + high - start", "low : high", TEST_LORA),
    Mutant("boxes of B are the first rows", ADAPTER, "self._product(B[row : row + rows]", "self._product(B[:rows]", TEST_LORA),
    Mutant("peft's B is in our order", ADAPTER, "parts = sorted(self._rows[hf_name])\n", "parts = [(0, 0, n, layer) for _, _, n, layer in self._rows[hf_name]]\n", TEST_LORA),
    Mutant("folded weights are rounded twice", WEIGHTS, "round_once(values, tensor.dtype) if values.dtype == torch.float64 else values", "values", TEST_LORA),
    Mutant("adapters are folded into any base", WEIGHTS, "        adapter.check_base(base, folder)\n", "        pass\n", TEST_LORA),
    Mutant("a run goes on from any base", "nemo_embed_core/train/first_weights.py", "adapter.check_base(weights, checkpoint)", "pass", TEST_LORA),
    Mutant("merging looks at no base", ADAPTER, "stored._replace(sha256=self.adapter.files[file])", "stored", TEST_LORA),
    Mutant("adapters of another alpha are gone on with", "nemo_embed_core/train/same_run.py", "and lora != replace(config.lora, dropout=0.0):", "and lora.rank != config.lora.rank:", TEST_LORA),
    Mutant("a resumed run says that it began with what it is given now", "nemo_embed_core/train/same_run.py", "stays = new if is_gone else old", "stays = new", "tests/train/test_init_layers.py"),
    # ---- the optimizer and the loop
    Mutant("AdamW ignores beta1 and beta2", OPTIM, '"betas": (config.beta1, config.beta2)', '"betas": (0.9, 0.999)', OPTIM_OPTIONS),
    Mutant("AdamW ignores eps", OPTIM, '"eps": config.eps', '"eps": 1e-8', OPTIM_OPTIONS),
    Mutant("norms decay too", OPTIM, '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}', OPTIM_OPTIONS),
    Mutant("nothing decays", OPTIM, '"weight_decay": config.weight_decay}', '"weight_decay": 0.0}', OPTIM_OPTIONS),
    Mutant("the warm-up begins at 0", SCHEDULE, "config.lr * (step + 1) / warmup_steps", "config.lr * step / warmup_steps", OPTIM_OPTIONS),
    Mutant("the rate falls to 0 instead of min_lr", SCHEDULE, "return config.min_lr + (config.lr - config.min_lr) * remaining", "return config.lr * remaining", OPTIM_OPTIONS),
    Mutant("the rate never reaches the optimizer", OPTIM, 'group["lr"] = lr', "pass", OPTIM_OPTIONS),
    Mutant("clip_norm never arrives", ENGINE, "clip_factor(norm, self.config.optim.clip_norm)", "clip_factor(norm, 1.0)", OPTIM_OPTIONS),
    Mutant("the seed never reaches the sampler", RUN_STATE, "config.global_batch_size, config.seed)", "config.global_batch_size, 0)", REST),
    Mutant("the seed never reaches the choice of documents", TRAINER, "mesh.tp.size, config.seed\n", "mesh.tp.size, 0\n", REST),
    Mutant("a pinned buffer is written while its copy is in flight", PREFETCH, "self._copied[turn].synchronize()", "pass", TEST_PREFETCH),
    Mutant("the batch that is ready is taken whatever step it is of", PREFETCH, "self._ahead is None or self._ahead[0] != step", "self._ahead is None", TEST_PREFETCH),
    Mutant("the loss is waited for before the next batch is begun", TRAINER, "            self.prefetch.begin(self.step + 1)\n        totals = read()\n", "            pass\n        totals = read()\n        self.prefetch.begin(self.step + 1)\n", TEST_PREFETCH),
    Mutant("the thread packs the step that is running once more", TRAINER, "self.sampler, step, mesh.dp_size", "self.sampler, max(0, step - 1), mesh.dp_size", f"{TEST_PREFETCH} {REST}"),
    Mutant("the largest micro-batch leaves its gradients", ENGINE, "self.forward_backward(batches, before)\n        self.drop_step()", "self.forward_backward(batches, before)", TEST_REHEARSAL),
    Mutant("the largest micro-batch is that of this rank's steps", TRAINER, "Most.of(gather_objects(mine))", "mine", TEST_REHEARSAL),
    Mutant("the largest micro-batch is run alone where gradients add up", SHAPES, "count = min(2, self.micro_batches)", "count = 1", f"tests/data/test_packing.py {TEST_REHEARSAL}"),
    Mutant("the largest micro-batch is of no graded pairs", SHAPES, "grades=torch.zeros(b) if loss.cosent_weight else None", "grades=None", "tests/data/test_packing.py tests/plan/test_plan.py"),
    Mutant("the largest micro-batch has no padding", SHAPES, "here = T, len(lengths) + (pad > 0)", "here = real, len(lengths)", "tests/data/test_packing.py"),
    Mutant("the largest micro-batch has a mean text for its longest", SHAPES, "rest = self.tokens - self.longest", "rest = self.tokens - self.tokens // self.sequences", "tests/data/test_packing.py"),
    Mutant("a run on a GPU begins without the largest micro-batch", TRAINER, 'self.mesh.device.type == "cuda" and', 'self.mesh.device.type == "cpu" and', TEST_REHEARSAL),
    Mutant("gradients of the step before are kept", ENGINE, "        self.optimizer.zero_grad(set_to_none=True)\n", "", OPTIM_OPTIONS),
    Mutant("a resumed run corrects the bias anew", OPTIM, "fill_(float(count))", "fill_(0.0)", "tests/train/test_resume.py tests/checkpoint/test_sharded.py"),
    Mutant("the sums of a step are not divided by tp", "nemo_embed_core/train/metrics.py", "totals = {name: value / mesh.tp.size", "totals = {name: value", TP2),
    Mutant("a spike is skipped where it should warn", TRAINER, 'mode == "skip"\n', "True\n", "tests/train/test_control.py tests/train/test_trainer.py"),
    Mutant("a resumed run counts skipped updates", "nemo_embed_core/train/run_state.py", "self.engine.optimizer, self.step - self.skipped)", "self.engine.optimizer, self.step)", "tests/train/test_control.py"),
    Mutant("a loss window without its limit", "nemo_embed_core/train/spikes.py", "loss = min(loss, mean + self.limit * std)", "pass", "tests/train/test_trainer.py"),
    Mutant("ranks that were not asked to stop go on", TRAINER, "if self._vote(self._stop)", "if self._stop", "tests/train/test_control.py"),
    # ---- split masters
    Mutant("split masters lose what a box has beyond bf16", "nemo_embed_core/checkpoint/weights.py", "    if rest is None:\n        tensor", "    if True:\n        tensor", MASTERS),
    Mutant("a checkpoint of split masters has their upper halves", "nemo_embed_core/checkpoint/write.py", "to_fp32(self.tensor.detach(), self.rest)", "self.tensor.float()", MASTERS),
    Mutant("gradients of bf16 shards are rounded to bf16", FSDP, "group._orig_dtype = torch.float32", "pass", f"{BF16} {MASTERS}"),
    Mutant("gradients of micro-batches add up in bf16 without FSDP2", FSDP, "is_alone = is_last and p.ndim > 1", "is_alone = p.ndim > 1", BF16),
    Mutant("tp ranks add the norms' gradients in bf16", FSDP, "is_alone = is_last and p.ndim > 1", "is_alone = is_last", BF16),
    Mutant("split masters are not clipped", OPTIM, "optimizer.factor = factor", "optimizer.factor = torch.ones_like(factor)", MASTERS),
    Mutant("a resumed run with split masters corrects the bias anew", OPTIM, "optimizer.num_updates = count", "optimizer.num_updates = 0", MASTERS),
    Mutant("random bits of a moment are the same in every step", OPTIM, "{self.seed} {self.num_updates} {name}", "{self.seed} {name}", f"{MOMENTS}::test_every_update_parameter_and_run_rounds_in_another_way"),
    Mutant("random bits of a moment are the same in every run", OPTIM, "{self.seed} {self.num_updates} {name}", "{self.num_updates} {name}", f"{MOMENTS}::test_every_update_parameter_and_run_rounds_in_another_way"),
    Mutant("random bits of a moment are the same in every parameter", OPTIM, "{self.seed} {self.num_updates} {name}", "{self.seed} {self.num_updates}", f"{MOMENTS}::test_every_update_parameter_and_run_rounds_in_another_way"),
    Mutant("random bits of a moment count from the shard's first row", OPTIM, "box[0][0] * shape[1] + box[0][1]", "box[0][1]", f"{MOMENTS}::test_every_layout_rounds_alike"),
    Mutant("blocks of a moment reach over what tp cuts", OPTIM, "tp_unit(name, config) if tp_dim(name) == 1 else shape[1]", "shape[1]", f"{MOMENTS}::test_no_layout_cuts_a_block"),
    Mutant("codes of a moment are written with bases of other blocks", "nemo_embed_core/train/run_state.py", "(rows, columns // block)", "(rows, columns)", f"{MOMENTS}::test_checkpoints_go_from_one_kind_to_another_and_to_every_layout"),
    Mutant("a step with a gradient that is not finite is taken", OPTIM, "optimizer.found_inf = (factor == 0).float()", "pass", f"{MASTERS} tests/train/test_control.py"),
    Mutant("a step with a loss that is not finite is taken", ENGINE, "else torch.where(finite, self.factor, 0.0)", "else self.factor", "tests/train/test_control.py"),
    # ---- fp8
    Mutant("an fp8 scale is not divided out", FP8, "scaled_mm(rows, x8.scale,", "scaled_mm(rows, torch.ones_like(x8.scale),", TEST_FP8),
    Mutant("each tp rank has an fp8 scale of its own", FP8, "if not is_part or tp.size == 1:", "if True:", TEST_FP8),
    Mutant("fp8 weights of the step before", FP8, "weight.is_kept, weight.made, weight.amax, weight.scale = False, None, None, None", "weight.is_kept = False", TEST_FP8),
    Mutant("the transpose of fp8 weights of an earlier step", FP8, "            self.made = made if", "            made = made._replace(columns=vars(self).setdefault('old', made).columns)\n            self.made = made if", TEST_FP8),
    Mutant("fp8 weights are quantised in every micro-batch", FP8, "layer.fp8.is_kept = keeps_whole", "layer.fp8.is_kept = False", TEST_FP8),
    Mutant("the gradient of an fp8 product has e4m3's range", FP8, "ctx.column, own), E5M2,", "ctx.column, own), E4M3,", TEST_FP8),
    Mutant("the largest value of another norm", "nemo_embed_core/model/llama.py", "residual_TD, amax = self.post_attention_layernorm(", "residual_TD, _ = self.post_attention_layernorm(", "tests/parallel/test_recompute.py -k fp8"),
    Mutant("the largest value of SwiGLU's gradient is doubled", "kernels/swiglu.py", "return dx, amax_ref(dx)", "return dx, 2 * amax_ref(dx)", "tests/parallel/test_recompute.py -k fp8"),
    Mutant("a largest value that was taken along is of this rank alone", FP8, "    own = amax(x.detach()) if own is None else own\n", "    if own is not None:\n        return own\n    own = amax(x.detach())\n", "tests/parallel/test_recompute.py -k fp8"),
    Mutant("each shard of a weight has an fp8 scale of its own", FP8, "bits = all_reduce_max(own.bfloat16().float().view(torch.int32), layers[0].fp8.shard_group)", "bits = own.bfloat16().float().view(torch.int32)", f"{TEST_GATHER}[2]"),
    Mutant("each tp rank has an fp8 scale of gathered weights", FP8, "bits = all_reduce_max(bits, layers[0].tp.group)", "pass", f"{TEST_GATHER}[4]"),
    Mutant("the fp8 scale of gathered weights is of fp32 masters", FP8, "own.bfloat16().float()", "own", f"{TEST_GATHER}[2]"),
    Mutant("fp32 masters are not rounded to bf16 before fp8", FP8, "local_tensor(layer.weight.detach()).bfloat16()", "local_tensor(layer.weight.detach())", f"{TEST_GATHER}[2]"),
    Mutant("the gradient of a weight gathered in fp8 is in fp8", FP8, "w.grad_dtype = torch.bfloat16", "pass", f"{TEST_GATHER}[2]"),
    Mutant("weights gathered in fp8 have the scales of the first step", FP8, "        layer.fp8.amax, layer.fp8.scale = of_layer, scale", "        old = vars(layer).setdefault('old', (of_layer, scale))\n        layer.fp8.amax, layer.fp8.scale = old", f"{TEST_GATHER}[2]"),
    Mutant("weights are gathered in bf16 for fp8", ENGINE, 'config.precision == "fp8" and mesh.shard_size > 1', "False", f"{TEST_GATHER}[2]"),
    Mutant("weights gathered in fp8 have two bytes", "nemo_embed_core/parallel/wire.py", "one_byte * (wire.weight_bytes - 1)", "0", WIRE),
    Mutant("fp8 inputs are sent in bf16", "nemo_embed_core/parallel/wire.py", "T * D if wire.fp8 else hidden", "hidden", WIRE),
    # ---- gradients over ranks
    Mutant("clipping without its clamp", GRAD_NORM, ".clamp(max=1.0)", "", OPTIM_OPTIONS),
    Mutant("clipping without its 1e-6", GRAD_NORM, "max_norm / (norm + 1e-6)", "max_norm / norm", OPTIM_OPTIONS),
    Mutant("replicated gradients count on every rank", GRAD_NORM, "_sum_of_squares(replicated, mesh.device) / mesh.tp.size", "_sum_of_squares(replicated, mesh.device)", TP2_SP),
    Mutant("the norm is this dp rank's", GRAD_NORM, "    all_reduce_(total, mesh.shard_group)\n", "", DP2),
    Mutant("the norm counts every copy of the state", GRAD_NORM, "all_reduce_(total, mesh.shard_group)", "all_reduce_(total, mesh.dp_group)", HSDP),
    Mutant("the norm is this tp rank's", GRAD_NORM, "        all_reduce_(total, mesh.tp.group)\n", "        pass\n", TP2),
    Mutant("norm gradients are not summed over tp", GRAD_NORM, "if mesh.tp.sequence_parallel or getattr", "if getattr", TP2_SP),
    Mutant("norms of heads keep their rank's share", LLAMA, "tp, of_heads=True)", "tp)", f"{BASES}[tp2-dp1]"),
    Mutant("norms of heads are summed once more", GRAD_NORM, "if mesh.tp.sequence_parallel or getattr(module, \"of_heads\", False)\n", "if True\n", f"{BASES}[tp2-dp1]"),
    Mutant("k has the norm of q", LLAMA, "k = k_norm(k", "k = q_norm(k", FAMILIES),
    Mutant("a bias has no rank's rows", "nemo_embed_core/parallel/layers.py", "y if self.bias is None else y + local(self.bias)", "y", FAMILIES),
    Mutant("causal in name alone", LLAMA, "partial(attention, causal=True) if config.is_causal else attention", "attention", FAMILIES),
    Mutant("every rank has the last token", POOLING, "mine = (index_N >= 0) & ", "mine = ", POOLINGS),
    Mutant("the last token is the next one's first", POOLING, "segments.cu_seqlens[1:] - 1", "segments.cu_seqlens[1:]", POOLINGS),
    Mutant("an empty text has its neighbour's token", POOLING, " & (segments.cu_seqlens.diff() > 0)", "", POOLINGS),
    Mutant("weights from 0", POOLING, "token_T - cu_seqlens[sequence_T] + 1", "token_T - cu_seqlens[sequence_T]", POOLINGS),
    Mutant("weights of the batch's positions", POOLING, "token_T - cu_seqlens[sequence_T] + 1", "token_T + 1", POOLINGS),
    Mutant("YaRN without its magnitude", LLAMA, "scaling.magnitude if scaling else 1.0", "1.0", FAMILIES),
    Mutant("YaRN stretches the short wavelengths", LLAMA, "keep = 1 - ((torch.arange", "keep = ((torch.arange", FAMILIES),
    Mutant("q's factor grows within the original length", LLAMA, ".double() // scaling.original", ".double() / scaling.original", FAMILIES),
    Mutant("an export of a causal model is proven bidirectional", "nemo_embed_core/export/consumers.py", "if config.get(\"is_causal\") is True:\n        if", "if False:\n        if", "tests/export/test_consumers.py"),
    Mutant("a window is read as none", "nemo_embed_core/model/spec.py", "num_key_value_heads=8, sliding_window=4096)", "num_key_value_heads=8)", FAMILIES),
    Mutant("bf16 gradient reduction", FSDP, "reduce_dtype=reduce_dtype,\n        cast", "reduce_dtype=torch.bfloat16,\n        cast", BF16),
    Mutant("rotary tables cast to bf16 by FSDP2", FSDP, "reduce_dtype=reduce_dtype,\n        cast_forward_inputs=False", "reduce_dtype=reduce_dtype,\n        cast_forward_inputs=True", BF16),
    Mutant("half-reduced gradients outlive a dropped step", FSDP, "group._partial_reduce_output = None", "pass", "tests/train/test_dropped_step.py"),
    Mutant("half-done gradients outlive a dropped step", FSDP, "parameter.unsharded_accumulated_grad = None", "pass", "tests/train/test_dropped_step.py"),
    Mutant("f is the identity both ways", COLLECTIVES, "return all_reduce_sum(grads[0], ctx.group), None", "return grads[0], None", TP2),
    Mutant("g sums both ways", COLLECTIVES, "        return grads[0], None\n\n\nclass _GatherTokens", "        return all_reduce_sum(grads[0], group=dist.group.WORLD), None\n\n\nclass _GatherTokens", TP2),
    Mutant("the gradient of a gather is this rank's own", COLLECTIVES, "return reduce_scatter_rows(grads[0].to(ctx.dtype), ctx.group), None, None", "return grads[0].chunk(ctx.group.size())[ctx.group.rank()], None, None", DP2),
    Mutant("gradients of gathered rows are summed in bf16", COLLECTIVES, "grads[0].to(ctx.dtype)", "grads[0]", WIRE),
    Mutant("rows are gathered in fp32 and rounded afterwards", COLLECTIVES, "all_gather_rows(x.to(dtype), group)", "all_gather_rows(x, group).to(dtype)", WIRE),
    Mutant("a column's weight gradient of this rank's tokens", COLLECTIVES, "dw = dy.t() @ gathered", "dw = dy.t()[:, : len(x)] @ x", TP2_SP),
    Mutant("ids of other ranks look up row 0", LAYERS, " * mine[:, None].to(weight.dtype)", "", TP2),
    Mutant("padding of the vocabulary is not where it should be", "nemo_embed_core/parallel/layout.py", "return -(-size // unit // tp_size) * unit", "return size // unit // tp_size * unit", TP2),
    Mutant("FSDP2's chunk is rounded down", "nemo_embed_core/parallel/boxes.py", "chunk = -(-size[0] // dp_size)", "chunk = size[0] // dp_size", DP2),
    Mutant("gathered weights are never freed in a plan", "nemo_embed_core/plan/pretend.py", "if storage._cdata in allocations.sizes:", "if size and storage._cdata in allocations.sizes:", "tests/plan/test_plan.py"),
    Mutant("a plan's kernels are their references", "nemo_embed_core/plan/pretend.py", 'mock.patch.object(torch.Tensor, "is_cuda", True)', 'mock.patch.object(torch.Tensor, "is_cuda", False)', "tests/plan/test_plan.py"),
    Mutant("a ring over nodes as fast as one node's", "nemo_embed_core/plan/time.py", "min(node, members * network)", "node", "tests/plan/test_plan.py"),
    # ---- the model
    Mutant("rotary tables in the activations' dtype", LLAMA, "torch.promote_types(x_TD.dtype, torch.float32)", "x_TD.dtype", BF16),
    Mutant("rotary angles computed in bf16", LLAMA, "position_ids_T[:, None].to(inv_freq.dtype) * inv_freq", "(position_ids_T[:, None].bfloat16() * inv_freq.bfloat16()).to(inv_freq.dtype)", BF16),
    Mutant("rotary angles computed in fp32", LLAMA, "position_ids_T[:, None].to(inv_freq.dtype) * inv_freq", "(position_ids_T[:, None].float() * inv_freq.float()).to(inv_freq.dtype)", ONE),
    Mutant("rope scaling without its linear part", LLAMA, ".clamp(0, 1)", ".round().clamp(0, 1)", ONE),
    Mutant("the other trainer trains in the dtype of the folder", "benchmarks/trainers.py", '"dtype": torch.float32}', '"dtype": "auto"}', "tests/benchmarks/test_trainers.py"),
    Mutant("the result of another measurement makes a commit changed", "nemo_embed_core/version.py", '"--", ".", *others', '"--", "."', "tests/export/test_card.py -k commit"),
    Mutant("rows of a quick run look whole", "benchmarks/step_report.py", '**({"quick": self.quick} if self.quick else {})', "**{}", "tests/benchmarks/test_step.py -k quick"),
    Mutant("FlashAttention-3 is causal", ATTENTION, "causal=causal, deterministic", "causal=True, deterministic", "tests/model/test_attention.py"),
    Mutant("a build without backward trains", ATTENTION, "and backward and not _flash3_has_backward()", "and not backward and not _flash3_has_backward()", "tests/model/test_attention.py"),
    Mutant("causal attention", ATTENTION, "F.scaled_dot_product_attention(q, k, v, is_causal=causal)", "F.scaled_dot_product_attention(q, k, v, is_causal=True)", ONE),
    Mutant("query heads share the wrong KV heads", ATTENTION, "k_TGA.repeat_interleave(r, 1), v_TGA.repeat_interleave(r, 1)", "k_TGA.repeat(1, r, 1), v_TGA.repeat(1, r, 1)", ONE),
    Mutant("the residual skips the MLP", LLAMA, "return self.mlp(x_TD, again, amax, token_keys_T), residual_TD", "return self.mlp(x_TD, again, amax, token_keys_T), x_TD", ONE),
    Mutant("selective recomputation saves it all", LAYERS, "return again if", "return saved if", RECOMPUTE),
    Mutant("a norm is made again of what stands before it", LLAMA, "(lambda: norm(kept)[0])", "(lambda: norm(kept)[1])", RECOMPUTE),
    Mutant("sums instead of means under sequence parallelism", POOLING, "unit(sums_ND / segments.cu_seqlens.diff().clamp(min=1)[:, None].to(sums_ND.dtype))", "unit(sums_ND)", TP2_SP,
           no_bug="the rows are scaled to unit length next, and their length is no part of the gradient; the division keeps sums in range"),
    Mutant("pooled rows are gathered and their gradients doubled", POOLING, "return reduce_from_tp(shares_ND, tp.group)", "return reduce_from_tp(shares_ND, tp.group) * 2 - reduce_from_tp(shares_ND, tp.group).detach()", TP2_SP),
    Mutant("pooled under sequence parallelism without the shard's offset", POOLING, "token_offset=tp.rank * hidden_TD.shape[0]", "token_offset=0", TP2_SP),
    Mutant("pooling in bf16", "kernels/mean_pool.py", "return x if x.dtype == torch.float64 else x.float()", "return x", BF16),
    Mutant("scores in bf16", "kernels/info_nce_own.py", "return x if x.dtype == torch.float64 else x.float()", "return x if x.dtype == torch.float64 else x.bfloat16()", BF16),
    Mutant("RMSNorm in bf16", "kernels/rms_norm.py", "wide_TD = hidden_TD.float() if", "wide_TD = hidden_TD if", "tests/kernels/test_rms_norm.py"),
    # ---- data
    Mutant("positions do not begin anew", PACKING, "np.repeat(cu_seqlens[:-1], lengths)", "np.repeat(cu_seqlens[:-1] * 0, lengths)", "tests/data/test_packing.py"),
    Mutant("queries are given their neighbours' embeddings", PACKING, "place[order] = np.arange(len(order))", "place = order", ONE),
    Mutant("missing documents are the first one", PACKING, "document_mask=torch.from_numpy(mask)", "document_mask=torch.ones(mask.shape, dtype=torch.bool)", ONE),
    Mutant("the longest groups all go to one rank", BINS, "heapq.heappush(heap, (load + int(tokens_B[position]), rank))", "heapq.heappush(heap, (0, rank))", "tests/data/test_packing.py"),
    Mutant("a micro-batch above max_tokens", BINS, "fitting = rooms >> length", "fitting = rooms >> (length - 1)", "tests/data/test_packing.py"),
    Mutant("texts are given back in the order of their lengths", PACKING, "yield order[start:end]", "yield np.arange(start, end)", "tests/data/test_packing.py"),
    Mutant("the same permutation in every epoch", SAMPLER, "_permutation(self.seed, epoch, self.num_rows)", "_permutation(self.seed, 0, self.num_rows)", "tests/data/test_sampler.py"),
    Mutant("the same negatives in every epoch", SAMPLER, "^ epochs_B.astype(np.uint64)", "^ np.zeros_like(epochs_B).astype(np.uint64)", "tests/data/test_sampler.py"),
    Mutant("the first negatives instead of a draw", SAMPLER, "order = np.lexsort((place, hashes, owner))", "order = np.lexsort((place, owner))", "tests/data/test_sampler.py"),
    Mutant("a batch at an epoch's end has the old epoch's rows", SAMPLER, "here = epochs == epoch", "here = epochs <= epoch", "tests/data/test_sampler.py"),
    Mutant("every epoch begins a dataset anew", SAMPLER, "which, place = divmod(first, len(rows))", "which, place = divmod(first - epoch * draws, len(rows))", "tests/data/test_sampler.py"),
    Mutant("all datasets share one order", SAMPLER, "^ np.uint64(part + 1))", "^ np.uint64(1))", "tests/data/test_sampler.py"),
    Mutant("a row that comes twice brings the same documents twice", SAMPLER, "passes_b[here] = which", "passes_b[here] = 0", "tests/data/test_sampler.py"),
    Mutant("an epoch leaves its last rows out", SAMPLER, "return -(-epochs * self.num_rows // self.global_batch_size)", "return epochs * self.num_rows // self.global_batch_size", "tests/data/test_sampler.py tests/train/test_trainer.py"),
    Mutant("a dataset's remainder is drawn in both epochs", SAMPLER, "numbers = np.concatenate([np.arange(a, b)", "numbers = np.concatenate([np.arange(0, b - a)", "tests/data/test_sampler.py"),
    Mutant("batches of a dataset come in any order", SAMPLER, 'placed[np.argsort(owners, kind="stable")] = numbers', "placed = numbers[order]", "tests/data/test_sampler.py"),
    Mutant("datasets follow each other", SAMPLER, "owners = owners[order]", "order = np.sort(order)", "tests/data/test_sampler.py"),
    Mutant("negatives that stand still", SAMPLER, 'if negatives == "rotate" else 0', "* 0", "tests/data/test_sampler.py"),
    Mutant("rows are too long for negatives that they never bring", POPULATION, 'if negatives == "first" else np.lexsort', "if None else np.lexsort", "tests/data/test_population.py"),
    Mutant("in batch a group is no group", PACKING, "if store.row_classes is not None:", "if False:", f"{LOSS} tests/data/test_build.py"),
    Mutant("all datasets share their groups", "nemo_embed_core/data/compile.py", 'f"{i} {row.group}"', 'f"{row.group}"', "tests/data/test_build.py"),
    Mutant("a store of before the groups is opened for rows with groups", "nemo_embed_core/data/readers.py", "[*how, *grade, *[GROUPED] * is_grouped]", "[*how, *grade]", "tests/data/test_build.py"),
    Mutant("a weight is a binary fraction", MIX, "Fraction(repr(dataset.weight))", "Fraction(dataset.weight)", "tests/data/test_mix.py"),
    Mutant("the same rows under a cap whatever the seed", MIX, "permutation(seed, i, -1", "permutation(0, i, -1", "tests/data/test_mix.py"),
    Mutant("a text has one length in all datasets", COMPILE, 'exact_key(f"{max_length} {prompt}{text}")', 'exact_key(f"{prompt}{text}")', "tests/data/test_mix_lengths.py"),
    Mutant("texts are cut as the next dataset says", COMPILE, "            self._submit()\n            self._max_length = max_length", "            self._max_length = max_length", "tests/data/test_mix_lengths.py"),
    Mutant("a dataset's last row counts for the next one", MIX, 'np.searchsorted(ends, rows_B, side="right")', 'np.searchsorted(ends - 1, rows_B, side="right")', "tests/train/test_mix_drawn.py"),
    Mutant("what another mix has drawn is forgotten", RUN_STATE, 'if "drawn" in manifest:', "if not manifest:", "tests/train/test_mix_drawn.py"),
    Mutant("micro-batches that best fit alone makes", BINS, "for fewer in range(least, count):", "for fewer in range(count, count):", "tests/data/test_packing.py"),
    Mutant("a swap moves no tokens", BINS, "loads[other] += more_FO[f, o]", "loads[other] += 0", "tests/data/test_packing.py"),
    Mutant("another mix goes on with a run", POPULATION, "digest.update(repr([part.draws for part in drawn]).encode())", "pass", "tests/data/test_mix.py"),
    Mutant("zero-width characters tell texts apart", "nemo_embed_core/data/normal_form.py", '"NFKC", _FORMAT.sub("", text))', '"NFKC", text)', "tests/data/test_normal_form.py"),
    Mutant("special tokens inside texts are special", "nemo_embed_core/data/tokenizer.py", "backend.encode_special_tokens = True", "backend.encode_special_tokens = False", "tests/data/test_tokenizer.py"),
    Mutant("a text that fills the length exactly counts as cut", "nemo_embed_core/data/tokenizer.py", "len(ids) == max_length and bool(encoding.overflowing)", "len(ids) == max_length", "tests/data/test_tokenizer.py tests/data/test_cuts.py"),
    # ---- looking at data
    Mutant("few of a bucket are found, however many are near", NEAR, "place not in self.found for place in", "True for place in", INSPECT),
    Mutant("a near-duplicate of a sampled text is found and the text itself not", NEAR, "                    self.found.setdefault(other, (place, same))", "                    pass", INSPECT),
    Mutant("evaluation texts that the data lacks count as copies", OVERLAP, "yield key, name\n                continue", "yield key, name", INSPECT),
    Mutant("missing documents are padded", "nemo_embed_core/data/inspect.py", "int((documents > 0).sum())", "documents.size", INSPECT),
    Mutant("density without the room that is left", "nemo_embed_core/data/inspect.py", "tokens / (micro_batches * config.max_tokens)", "tokens / (steps * config.max_tokens)", INSPECT),
    Mutant("cells of the page as they are", "nemo_embed_core/files/html.py", "{escaped(c)}</{tag}>", "{c}</{tag}>", INSPECT),
    # ---- reading
    Mutant("row groups are read ahead", COLUMNAR, "pre_buffer=False, buffer_size=1 << 16", "buffer_size=1 << 16", "tests/data/test_dataset.py"),
    Mutant("a columnar file is read by thousands of rows", COLUMNAR, "BATCH = 64", "BATCH = 4096", "tests/data/test_dataset.py"),
    Mutant("every graded pair is relevant", "nemo_embed_core/data/formats/dataset.py", "positive(_rows(config, metadata, documents, findings), config.min_grade, findings)", "_rows(config, metadata, documents, findings)", "tests/data/test_dataset.py"),
    Mutant("a dataset of which no row is left", "nemo_embed_core/data/readers.py", "if drop and findings.num_rows == before", "if False and findings.num_rows == before", "tests/data/test_prepare.py"),
    Mutant("a damaged file ends quietly where rows are left out", "nemo_embed_core/data/lines.py", "if row and isinstance(self.dropped, Texts)", "if isinstance(self.dropped, Texts)", "tests/data/test_prepare.py"),
    Mutant("a store that lacks rows is opened by a run that would not leave them out", COMPILE, 'and config.on_bad == "error":', "and False:", "tests/data/test_prepare.py"),
    Mutant("texts that are being tokenised are forgotten", COMPILE, "    def _submit(self) -> None:\n        self._write()\n", "    def _submit(self) -> None:\n", "tests/data/test_build.py"),
    Mutant("a folder of other sources is taken for this one", "nemo_embed_core/data/prepare.py", "read_metadata(path).made_of == made_of[name]", "read_metadata(path).made_of", "tests/data/test_prepare.py"),
    Mutant("texts of a store's sources in TMPDIR", "nemo_embed_core/data/build.py", "as temporary, texts_in(folder.parent):", "as temporary:", "tests/data/test_prepare.py"),
    Mutant("texts are held too", "nemo_embed_core/data/texts.py", "        self._pending += data\n", '        self._pending += data\n        self.__dict__.setdefault("held", []).append(data)\n', "tests/mine/test_memory.py"),
    Mutant("a verb inside another takes its place for texts with it", "nemo_embed_core/data/texts.py", "        _kept = before\n", "        _kept = Kept()\n", "tests/data/test_texts.py"),
    Mutant("what a corpus has to say is said of the first split alone", "nemo_embed_core/data/readers.py", "        if own is not of_corpus:", "        if own is findings[0]:", "tests/evaluation/test_pools.py"),
    Mutant("the digest of a split has the one before in it", "nemo_embed_core/evaluation/pools.py", "self._of_corpus[pool].copy()", "self._of_corpus[pool]", "tests/evaluation/test_pools.py"),
    # ---- mining
    Mutant("rows behind one that its grade leaves out have its query", "nemo_embed_core/mine/folder.py", 'FolderTexts(folder, "queries", self._at)', 'FolderTexts(folder, "queries")', "tests/mine/test_folder.py"),
    Mutant("a written row has the query of a record that its grade leaves out", "nemo_embed_core/mine/folder.py", "int(self._at[row])", "int(row)", "tests/mine/test_folder.py"),
    Mutant("negatives are counted for each format", "nemo_embed_core/mine/formats.py", "has = has or _num", "has = _num", "tests/mine/test_formats.py"),
    Mutant("no room is asked for texts", "nemo_embed_core/mine/run.py", "    needed = num_bytes\n", "    needed = 0\n", "tests/mine/test_run.py"),
    Mutant("each split that is excluded reads the corpus", "nemo_embed_core/mine/inputs.py", "found.setdefault(folder if folder and Path(folder).is_dir() else path, [])", "found.setdefault(path, [])", "tests/mine/test_run.py"),
    Mutant("a ceiling above a negative score", SELECTION, "np.where(s >= 0, threshold * s, (2 - threshold) * s)", "threshold * s", TEST_NEGATIVES),
    Mutant("the margin is added", SELECTION, "lowest.astype(np.float64) - selection.absolute_margin", "lowest.astype(np.float64) + selection.absolute_margin", TEST_NEGATIVES),
    Mutant("the best are not left out", SELECTION, "keep[:, : selection.range_min] = False", "pass", TEST_NEGATIVES),
    Mutant("min_score leaves out what equals it", SELECTION, "keep &= scores >= selection.min_score", "keep &= scores > selection.min_score", TEST_NEGATIVES),
    Mutant("the best-scoring positive gives the ceiling", "nemo_embed_core/mine/negatives.py", "np.minimum.reduceat(scores", "np.maximum.reduceat(scores", TEST_NEGATIVES),
    Mutant("spelling variants are searched", POOL, '= self._append(text, exact, "variants")', '= self._append(text, exact, "")', TEST_NEGATIVES),
    Mutant("a second search of all queries is reported as the first", "nemo_embed_core/mine/lists.py", "if is_first:", "if len(rows) == len(self.queries):", TEST_NEGATIVES),
    Mutant("documents known from other data come back", POOL, "classes = [(known[known >= 0], documents), ", "classes = [", "tests/mine/test_negatives.py tests/mine/test_launch.py"),
    Mutant("a score at the ceiling is kept", CANDIDATES, "torch.isfinite(exact) & (exact < self.ceilings[:, None])", "torch.isfinite(exact) & (exact <= self.ceilings[:, None])", TEST_TOPK),
    Mutant("lower bounds are upper bounds", CANDIDATES, "[:, 0] - 2 * bound", "[:, 0]", TEST_TOPK),
    Mutant("bounds of candidates below the ceiling are left out", CANDIDATES, "next_after(self.ceilings + 2 * bound)", "next_after(self.ceilings)", TEST_TOPK),
    Mutant("ties go to the higher id", STREAMING, "by_id = ids.argsort(dim=1, stable=True)", "by_id = ids.argsort(dim=1, stable=True, descending=True)", TEST_TOPK),
    Mutant("documents that the first block dropped are forgotten", "nemo_embed_core/mine/search/gpu_filter.py", "torch.isneginf(most_dropped) | (most_dropped < self.scores[:, -1])", "torch.ones_like(most_dropped, dtype=torch.bool)", "tests/mine/test_stored.py"),
    Mutant("a block's floor is of upper bounds", "nemo_embed_core/mine/search/buffers.py", "keys - 2 * narrow, -torch.inf)", "keys, -torch.inf)", "tests/mine/test_stored.py"),
    Mutant("exclusions of another block of queries", TOPK, "exclude.take(np.arange(rows.start, rows.stop))", "exclude.take(np.arange(rows.stop - rows.start))", TEST_TOPK),
    Mutant("a bound that forgets the rounding of its rows", BOUNDS, "norm_above(x_nD), torch.zeros(len(x_nD)", "0 * norm_above(x_nD), torch.zeros(len(x_nD)", TEST_TOPK),
    # ---- checkpoints
    Mutant("a flipped bit goes unseen", MANIFEST, "if digest != sha256:", "if False:", "tests/checkpoint/test_sharded.py tests/merge/test_merge.py"),
    Mutant("pieces that overlap are accepted", MANIFEST, "if overlap(box, (other", "if None and overlap(box, (other", "tests/checkpoint/test_sharded.py tests/checkpoint/test_fuzz.py"),
    Mutant("the oldest checkpoints are kept", RUNS, "for old in whole[keep:]:", "for old in whole[:-keep]:", "tests/checkpoint/test_sharded.py tests/checkpoint/test_crash_states.py"),
    Mutant("keep_every keeps nothing", RUNS, "(keep_every and", "(0 and", "tests/checkpoint/test_sharded.py tests/checkpoint/test_crash_states.py"),
    Mutant("the weights may change while a save copies", SAVER, "self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)", "self._buffers[name] = piece.tensor.detach()", "tests/checkpoint/test_saver.py"),
    Mutant("an average of fp32 sums", AVERAGE, "orders = 22 - precision", "orders = 30 - precision", "tests/merge/test_average.py"),
    Mutant("the manifest's own digest is not asked for", MANIFEST, 'if manifest.get("digest") != _digest(manifest):', "if False:", "tests/checkpoint/test_sharded.py tests/checkpoint/test_fuzz.py"),
    # ---- exports and evaluation
    Mutant("a pool keeps queries without a relevant document", "nemo_embed_core/evaluation/pools.py", "default=0) > 0", "default=0) >= 0", "tests/evaluation/test_pools.py"),
    Mutant("a pool searches the first documents instead of its own", "nemo_embed_core/evaluation/retrieval.py", "inside[i][first : first + len(part_ND)]", "inside[i][: len(part_ND)]", "tests/evaluation/test_pools.py"),
    Mutant("ranks' rows come back in the order of their lengths", "nemo_embed_core/evaluation/encoding.py", "rows[own] = gathered[rank * most : rank * most + len(own)]", "rows[rank * most : rank * most + len(own)] = gathered[rank * most : rank * most + len(own)]", "tests/evaluation/test_pools.py"),
    Mutant("documents of mteb's searches get the instruction", "nemo_embed_core/evaluation/instructions.py", 'if is_search and side == "document" and not isinstance(own, dict):', "if False:", "tests/evaluation/test_tasks.py"),
    Mutant("the second model continues the first one's draws", "nemo_embed_core/evaluation/hub_data.py", "own = copy.deepcopy(task)", "own = copy.copy(task)", "tests/evaluation/test_tasks.py"),
    Mutant("results of other options take the same revision", "nemo_embed_core/evaluation/mteb_results.py", "    if set_by:", "    if False:", "tests/evaluation/test_tasks.py"),
    Mutant("tp ranks of a sequence-parallel model pool their own tokens alone", "nemo_embed_core/model/pooling.py", "sums_ND = whole(sums_ND, tp)", "sums_ND = sums_ND", TP2_SP),
    Mutant("exports say another pooling than the model's", "nemo_embed_core/model/spec.py", "flag: mode == POOLINGS[pooling].mode", 'flag: mode == "cls"', "tests/model/test_pooling.py tests/export/test_folder.py"),
    Mutant("pooling without the prompt", "nemo_embed_core/export/folder.py", '"include_prompt": True', '"include_prompt": False', "tests/export/test_folder.py"),
    Mutant("exports without the length", "nemo_embed_core/export/folder.py", '"max_seq_length": usage.longest', '"max_seq_length": 512', "tests/export/test_folder.py tests/merge/test_merge.py"),
    Mutant("exports without their prompts", "nemo_embed_core/export/folder.py", '"prompts": usage.named_prompts()', '"prompts": {"query": "", "document": ""}', "tests/export/test_folder.py tests/merge/test_merge.py"),
    Mutant("exports that run causally", "nemo_embed_core/export/folder.py", '"is_causal": model.is_causal', '"is_causal": True', "tests/export/test_folder.py tests/export/test_proof.py"),
    Mutant("rotary base left out of the export", "nemo_embed_core/export/folder.py", '"rope_theta": model.rope_theta}', '"rope_theta": 10000.0}', "tests/export/test_folder.py tests/export/test_proof.py"),
    # ---- scores in training
    Mutant("a rank without a batch counts the one that it fills in", EVALUATION, "if i < share.num_mine:", "if i < share.rounds:", f"{DEV_TESTS}::test_every_layout_gives_the_same_figures"),
    Mutant("relevant documents are negatives of the dev loss", EVALUATION, "np.union1d(relevant, own_keys)", "own_keys", f"{DEV_TESTS}::test_figures_are_those_of_launch_evaluate_and_of_the_formula_of_the_loss"),
    Mutant("a query's own document is a negative of the dev loss", EVALUATION, "np.union1d(relevant, own_keys)", "relevant", f"{DEV_TESTS}::test_figures_are_those_of_launch_evaluate_and_of_the_formula_of_the_loss"),
    Mutant("a query's own document is a positive of the dev loss", EVALUATION, "relevant = np.setdiff1d(judged_keys, own_keys)", "relevant = np.unique(judged_keys)", f"{DEV_TESTS}::test_figures_are_those_of_launch_evaluate_and_of_the_formula_of_the_loss"),
    Mutant("an evaluation after the last save is in no manifest", TRAINER, "record_evaluation(self.output, self.step, self.state.evaluated)", "pass", f"{DEV_TESTS}::test_a_signal_in_the_last_step_leaves_its_evaluation_to_the_resume"),
    Mutant("a step that equals the best replaces it", EVALUATION, 'else value > best["value"]', 'else value >= best["value"]', f"{DEV_TESTS}::test_the_best_checkpoint_is_kept_beside_the_newest"),
    Mutant("the least loss is the worst", EVALUATION, 'is_less = metric.endswith("/loss")', "is_less = False", f"{DEV_TESTS}::test_the_best_checkpoint_is_kept_beside_the_newest"),
    Mutant("another dev set goes on with the best", EVALUATION, 'state.evaluated["digest"] != digest', "not digest", f"{DEV_TESTS}::test_the_best_checkpoint_is_kept_beside_the_newest"),
    Mutant("the best checkpoint is deleted", "nemo_embed_core/checkpoint/runs.py", "or old.name == best ", "", f"{DEV_TESTS}::test_the_best_checkpoint_is_kept_beside_the_newest"),
    Mutant("a document with the query's own id is found", "nemo_embed_core/evaluation/dev.py", "best.documents != self.own_Q[best.rows]", "best.documents >= 0", f"{DEV_TESTS}::test_figures_are_those_of_launch_evaluate_and_of_the_formula_of_the_loss"),
    Mutant("an evaluation before the first step stands twice", "nemo_embed_core/train/metrics.py", 'is_done = "loss" in values or', "is_done = True or", f"{DEV_TESTS}::test_killed_in_an_evaluation_and_in_the_save_of_the_best"),
    Mutant("lines that a tracker has no room for are not counted", "nemo_embed_core/train/trackers.py", "self.dropped += 1", "pass", "tests/train/test_trackers.py"),
    Mutant("a tracker that raises ends its thread", "nemo_embed_core/train/trackers.py", "except BaseException as error:", "except MemoryError as error:", "tests/train/test_trackers.py"),
    # ---- overlap and alarms
    Mutant("runs of words go over the end of a text", "nemo_embed_core/data/contained.py", "whole = owner[:ends] == owner[RUN - 1 :]", "whole = np.ones(ends, bool)", "tests/evaluation/test_overlap.py"),
    Mutant("texts that two sources share are evidence, however many share them", "nemo_embed_core/data/contained.py", "order[times[inverse[order]] <= COMMON]", "order[times[inverse[order]] > 0]", "tests/evaluation/test_overlap.py"),
    Mutant("a passage behind the first characters of a page is not looked for", "nemo_embed_core/evaluation/overlap.py", "forms = [normal_form(text) for text in texts]", "forms = [normal_form(text[:CHARACTERS]) for text in texts]", "tests/evaluation/test_overlap.py"),
    Mutant("near-duplicates are told away before their signatures", "nemo_embed_core/evaluation/overlap.py", "self._share(own) >= NEAR]", "self._share(own) > 0.99]", "tests/evaluation/test_overlap.py"),
    Mutant("a training text is new each time", "nemo_embed_core/evaluation/overlap.py", "is_new[first[~known]] = True", "is_new[first] = True", "tests/evaluation/test_overlap.py"),
    Mutant("twenty languages with an interval of one", "nemo_embed_core/evaluation/alarms.py", "level = 1 - (1 - LEVEL) / len(names)", "level = LEVEL", "tests/evaluation/test_alarms.py"),
    Mutant("a language is worse whatever its interval says", "nemo_embed_core/evaluation/alarms.py", 'if one["high"] < 0]', 'if one["difference"] < 0]', "tests/evaluation/test_alarms.py"),
    Mutant("directions that no row has are forgotten", "nemo_embed_core/evaluation/alarms.py", "if kept.sum() < rows.shape[1] else []", "if kept.sum() < 0 else []", "tests/evaluation/test_alarms.py"),
    Mutant("the spread of a run counts a document twice", "nemo_embed_core/train/watch.py", "if there and document not in self._ids:", "if there:", "tests/train/test_watch.py"),
    Mutant("the spread of a run counts a query for each forward", "nemo_embed_core/train/watch.py", "if row not in self._drawn]", "]", "tests/train/test_watch.py"),
    Mutant("negatives are trivial by the sum of all terms", "nemo_embed_core/train/watch.py", 'if "losses" not in values:', "if True:", "tests/train/test_watch.py"),
    Mutant("negatives are trivial by the least of the widths", "nemo_embed_core/train/watch.py", "return max((loss for loss in each", "return min((loss for loss in each", "tests/train/test_watch.py"),
    Mutant("a resumed run forgets its alarms", "nemo_embed_core/train/metrics.py", "watch.recall(map(json.loads, kept))", "pass", "tests/train/test_watch.py"),
    Mutant("alarms of later steps stand under a checkpoint", "nemo_embed_core/evaluation/beside.py", 'if values["step"] <= step_of(folder.name) else ()', "", "tests/evaluation/test_beside.py"),
    Mutant("a sample of the first texts", "nemo_embed_core/evaluation/beside.py", "first = np.argsort(numbers)[:SAMPLED]", "first = np.arange(len(numbers))[:SAMPLED]", "tests/evaluation/test_beside.py"),
    Mutant("BM25 without the length of documents", "nemo_embed_core/evaluation/bm25.py", "b * np.frombuffer(lengths, np.int64) / mean_length", "b", "tests/evaluation/test_bm25.py"),
    Mutant("BM25 counts a repeated word of the query once", "nemo_embed_core/evaluation/bm25.py", "occurrences * idf * counts", "idf * counts", "tests/evaluation/test_bm25.py"),
    Mutant("intervals count the residual twice", "nemo_embed_core/evaluation/crossed.py", "max(seeds + queries - rest, seeds, queries)", "seeds + queries", "tests/evaluation/test_crossed.py"),
    Mutant("intervals over queries alone", "nemo_embed_core/evaluation/crossed.py", "max(seeds + queries - rest, seeds, queries)", "queries", "tests/evaluation/test_crossed.py"),
    Mutant("a changed file is the same step", "nemo_embed_core/steps/step.py", "[n.digest for n in needs], read,", "[n.digest for n in needs],", "tests/experiments/test_grid.py::test_a_step_is_shared_by_cells_and_changes_with_all_that_it_reads"),
    Mutant("a step that follows from another one is the same", "nemo_embed_core/experiments/cells.py", "first in (place, place.partition(\".\")[0])", "first == place", "tests/experiments/test_grid.py::test_placeholders_and_patches_reach_the_options_of_their_cell"),
    Mutant("a grid may cut to less than the model's columns alone", "nemo_embed_core/experiments/cells.py", "int(cut[1:]) > (columns", "int(cut[1:]) >= (columns", "tests/experiments/test_grid.py::test_more_columns_than_the_model_has_are_refused_before_anything_runs"),
    Mutant("of a grid's merge no columns are known", "nemo_embed_core/experiments/cells.py", "if cut and int(cut[1:])", "if cut and made[step].verb.name == \"train\" and int(cut[1:])", "tests/experiments/test_grid.py::test_more_columns_than_the_model_has_are_refused_before_anything_runs"),
    Mutant("data behind a link in a folder may change", "nemo_embed_core/files/durable.py", "followlinks=True", "followlinks=False", "tests/experiments/test_grid.py"),
    Mutant("dev sets are no input of a training", "nemo_embed_core/steps/verbs.py", '"eval.datasets.path", "eval.datasets.source"),', "),", "tests/experiments/test_grid.py"),
    Mutant("several reports of one step pass", "nemo_embed_core/steps/verbs.py", '["split"] if "," in str(options.get("split")) else []', "[]", "tests/experiments/test_grid.py"),
    Mutant("a number for a constant stays a text", "nemo_embed_core/experiments/grid.py", "if isinstance(own, str):", "if True:", "tests/experiments/test_grid.py"),
    Mutant("a build that is published meanwhile ends another", "nemo_embed_core/data/building.py", "        with suppress(FileNotFoundError):\n            times", "        if True:\n            times", "tests/data/test_build.py"),
    Mutant("a local model is known by its name", "nemo_embed_core/pipeline/stages.py", "for path in local if path)]", "for path in local if not path)]", "tests/pipeline/test_stages.py"),
    Mutant("a failure is seen when all have ended", "nemo_embed_core/steps/runner.py", "return_when=FIRST_COMPLETED", 'return_when="ALL_COMPLETED"', "tests/experiments/test_run.py"),
    Mutant("a step that waits keeps others from starting", "nemo_embed_core/steps/runner.py", "in itertools.islice(ready, self.jobs - len(running))", "in [s for s in itertools.islice(waiting.values(), 1) if s in ready]", "tests/experiments/test_run.py"),
    Mutant("a step that another command runs is run too", "nemo_embed_core/steps/runner.py", "                lock.acquire()\n", "                return lock\n", "tests/experiments/test_run.py"),
    Mutant("training that a signal stopped is done", "nemo_embed_core/steps/runner.py", 'if manifest["step"] < manifest["config"]["steps"]:', "if False:", "tests/experiments/test_run.py"),
    Mutant("half a model has its name", "nemo_embed_core/steps/runner.py", "        product.rename(aside)\n", "        aside = product\n", "tests/experiments/test_run.py"),
    Mutant("a model that is made again is whole before it is", "nemo_embed_core/steps/runner.py", "(folder / DONE).unlink(missing_ok=True)", "pass", "tests/experiments/test_run.py"),
    Mutant("a model that a step is given is deleted", "nemo_embed_core/steps/runner.py", "if not product.is_symlink() and not is_given:", "if not product.is_symlink():", "tests/experiments/test_run.py"),
    Mutant("one seed and one score have an interval", "nemo_embed_core/evaluation/crossed.py", "queries if smallest > 1 else math.nan", "queries", "tests/experiments/test_table.py"),
    Mutant("differences of a mean over tasks are those of one", "nemo_embed_core/experiments/table.py", "float(np.mean([value for value, _ in found.values()]))", "next(iter(found.values()))[0]", "tests/experiments/test_table.py"),
    Mutant("judged with grade 0 is relevant", "nemo_embed_core/experiments/judge.py", "if grade > 0 and d in", "if d in", "tests/experiments/test_judge.py"),
    Mutant("as high as the best positive", "nemo_embed_core/experiments/judge.py", "lowest = min(", "lowest = max(", "tests/experiments/test_judge.py"),
    Mutant("rows of q and k as llama.cpp has them", "nemo_embed_core/checkpoint/gguf_reader.py", ".swapaxes(1, 2).reshape", ".reshape", "tests/checkpoint/test_gguf_reader.py"),
    Mutant("a GGUF has rows of q and k as Hugging Face does", "nemo_embed_core/export/gguf.py", "if of_heads and architecture in NEIGHBOURS", "if False", "tests/export/test_gguf.py"),
    Mutant("a GGUF's wavelengths of Llama 3 are upside down", "nemo_embed_core/export/gguf.py", "(plain / rope_inv_freq(model).numpy())", "(rope_inv_freq(model).numpy() / plain)", "tests/export/test_gguf.py"),
    Mutant("a GGUF says that it is causal", "nemo_embed_core/export/gguf.py", "writer.add_causal_attention(model.is_causal)", "writer.add_causal_attention(True)", "tests/export/test_gguf.py"),
    Mutant("a consumer's vectors of texts together are not compared", "nemo_embed_core/export/serving.py", '"together": ("together_ND", 0, texts),', "", "tests/export/test_serving.py"),
    Mutant("a push goes beside other files", HUB, "    if others:", "    if False:", TEST_HUB),
    Mutant("a push does not look at what the hub has", HUB, "if entry is None or not _is_same(operation, files[name], entry):", "if entry is None:", TEST_HUB),
    Mutant("what a push needs is missed behind the proof", "nemo_embed_core/merge/publish.py", 'if find_spec("mteb") is None:', "if False:", "tests/export/test_hub.py::test_without_mteb_nothing_is_proven_first"),
    Mutant("a push overwrites what changed meanwhile", HUB, "parent_commit=info.sha if info else None", "parent_commit=None", TEST_HUB),
    Mutant("an error of the hub shows the token", HUB, 'said.replace(get_token() or "\\0", "***")', "said", TEST_HUB),
    Mutant("a folder of anybody is pushed", "nemo_embed_core/merge/merge.py", "is_ours = ours or push is not None", "is_ours = ours", TEST_HUB),
    Mutant("a file that its program was not asked about is pushed", "nemo_embed_core/merge/merge.py", "(*LIBRARIES, *consumers, *files)", "(*LIBRARIES, *consumers)", TEST_HUB),
    Mutant("mteb gives documents the query's instruction", MODEL_META, "prompts[metadata.name] = ours if is_search else ours[None]", "pass", "tests/evaluation/test_tasks.py -k meta"),
    Mutant("a card has the scores of other weights", MODEL_META, 'entry["digest"] == digests', 'entry["digest"] != digests', "tests/evaluation/test_tasks.py -k card"),
    Mutant("a variant is not asked for faults", SERVING, "            check_faults(what, theirs, ours, faults)\n", "", TEST_SERVING),
    Mutant("a fault's share counts in the other direction", FAULTS, "if not share <= MOST:", "if not share >= -MOST:", TEST_SERVING),
    Mutant("a variant's prompts are not compared", SERVING, '{"a missing prompt": asked.ours_ND[: len(of)]}', "{}", TEST_SERVING),
    Mutant("the fault of a mask is none", FAULTS, "else partial(layer.attention, causal=True)\n    found", "else layer.attention\n    found", TEST_SERVING),
    Mutant("fp16 need not agree", SERVING, "if not cosines[worst] >= variant.cosine:", "if False:", TEST_SERVING),
    Mutant("a served file sees padding", "nemo_embed_core/encoders/onnx_runtime.py", "mask_NL[row, : len(tokens[i])] = tokens[i], 1", "mask_NL[row] = tokens[i], 1", "tests/evaluation/test_encoders.py -k served_file"),
    Mutant("ONNX pools what is padding", "nemo_embed_core/export/onnx.py", "/ mask_NL.sum(1, keepdim=True)", "/ mask_NL.shape[1]", "tests/export/test_serving.py"),
    # ---- the site
    Mutant("a link to a folder stays on the site", "docs/pages.py", 'if there else words', 'if words else words', "tests/test_docs.py -k links_are"),
    Mutant("what a stylesheet loads is not seen", "docs/pages.py", '(name == "href" and tag == "link")', "False", "tests/test_docs.py -k elsewhere"),
    Mutant("a message changes and its page does not", "nemo_embed_core/train/spikes.py", "the step was refused and", "the step is refused and", "tests/test_docs.py -k troubleshooting"),
    Mutant("a command without arguments is a traceback", "nemo_embed_core/command_line.py", '[*argv[1:], ""], strict=False)', '[*argv[1:], ""], strict=True)', "tests/test_options.py -k without_arguments"),
    # ---- pairs from documents
    Mutant("a sample of the documents is of one split", "nemo_embed_core/synthesize/documents.py", '{seed}\\0sample\\0{', '{seed}\\0{', "tests/synthesize/test_self_pairs.py -k sample"),
    Mutant("two outputs write into one journal", "nemo_embed_core/synthesize/generate.py", "(output.resolve(), journal.parent.resolve())", "(output.resolve(),)", "tests/synthesize/test_generate.py -k share"),
    Mutant("answers are paid again for a document more", "nemo_embed_core/steps/verbs.py", 'own=(("generate", "journal", f"{HERE}answers/journal.jsonl"),),', "own=(),", "tests/pipeline/test_stages.py -k rows_of_models"),
    Mutant("other documents are the same pipeline", "nemo_embed_core/pipeline/stages.py", "digests[documents] = setting.documents", 'digests[documents] = ""', "tests/pipeline/test_stages.py -k bytes"),
    Mutant("what does not fit is trained", "nemo_embed_core/pipeline/method.py", "if least <= machine.memory else", "if True else", "tests/pipeline/test_method.py"),
    Mutant("a difference by chance is a proof", "nemo_embed_core/pipeline/report.py", 'difference["p_holm"] < SURE', "True", "tests/pipeline/test_page.py -k hundred"),
    Mutant("a document may be in both splits of a pipeline", "nemo_embed_core/pipeline/report.py", 'sorted(files["train"] & files["test"])', "sorted(set[str]())", "tests/pipeline/test_page.py -k both_splits"),
    Mutant("texts of a page stand to the right", "nemo_embed_core/files/html.py", 'kinds = ["" if figures else', 'kinds = ["" if figures or head else', "tests/pipeline/test_page.py -k figures"),
    Mutant("bars have no owner", "nemo_embed_core/files/html.py", "{above}</text>", "{escaped(label)}</text>", "tests/pipeline/test_page.py -k bars"),
    Mutant("the base's alarms are the pipeline's", "nemo_embed_core/pipeline/report.py", 'label.items() if name == "tuned")', 'label.items() if name == "base")', "tests/pipeline/test_page.py -k stages"),
    Mutant("a page obeys what a document says", "nemo_embed_core/pipeline/page.py", "{escaped(text)}</p>", "{text}</p>", "tests/pipeline/test_page.py"),
    Mutant("a shown command leaves out what is 0", "nemo_embed_core/options.py", "elif value != defaults[name] and not", "elif value and value != defaults[name] and not", "tests/pipeline/test_stages.py -k dry_run"),
    Mutant("a sentence stays in its document", "nemo_embed_core/synthesize/self_pairs.py", 'blocks[number].replace(sentence, "")', "blocks[number]", "tests/synthesize/test_self_pairs.py"),
    Mutant("a held-out row may stand in train", "nemo_embed_core/synthesize/self_pairs.py", 'if key in train.rows or any(', "if any(", "tests/synthesize/test_self_pairs.py"),
    Mutant("a held-out document's text may stand in train", "nemo_embed_core/synthesize/self_pairs.py", "held_out.chunks[place].text) in texts", "held_out.chunks[place].text) in ()", "tests/synthesize/test_self_pairs.py"),
    Mutant("a chunk may be longer than its limit", "nemo_embed_core/synthesize/chunks.py", "size + 2 + len(piece) <= max_chars", "size + len(piece) <= max_chars", "tests/synthesize/test_structure.py"),
    Mutant("text of a page's menu is the document's", "nemo_embed_core/synthesize/structure.py", "elif not self._skipped:", "else:", "tests/synthesize/test_structure.py"),
    Mutant("a reply is asked for again after a kill", "nemo_embed_core/synthesize/ask.py", "if self.journal.has(request.digest):", "if False:", "tests/synthesize/test_generate.py -k killed"),
    Mutant("a reply to another document counts", "nemo_embed_core/synthesize/client.py", "sent = [self.model, self.prompt, self.parameters]", "sent = [self.model, self.parameters]", "tests/synthesize/test_generate.py -k another_document"),
    Mutant("a document more moves every other one", "nemo_embed_core/synthesize/plan.py", '(splitmix64(keys_N ^ np.uint64(_hash(f"{seed}\\0document\\0{index}"))).argmax())', '(_hash(f"{seed}\\0document\\0{index}") % len(keys_N))', "tests/synthesize/test_plan.py"),
    Mutant("an error loses the answers in flight", "nemo_embed_core/synthesize/ask.py", "                self._stop(error)\n\n        async with", "                raise\n\n        async with", "tests/synthesize/test_generate.py -k any_error"),
    Mutant("a signal loses the answers in flight", "nemo_embed_core/synthesize/ask.py", "            self._stop()\n            self.log(", "            task.cancel()\n            self.log(", "tests/synthesize/test_generate.py -k signal"),
    Mutant("a request that a server failed in is unpaid", "nemo_embed_core/synthesize/client.py", "(409, 425, 429, 503)", "(409, 425, 429, 503, 502)", "tests/synthesize/test_client.py"),
    Mutant("an answer may drip for ever", "nemo_embed_core/synthesize/client.py", "asyncio.timeout(self._timeout_s)", "asyncio.timeout(None)", "tests/synthesize/test_client.py -k drips"),
    Mutant("a key is masked in answers", "nemo_embed_core/synthesize/client.py", "body = raw.http_response.text", "body = self._hidden(raw.http_response.text)", "tests/synthesize/test_client.py"),
    Mutant("a row that the judge was not asked of is accepted", "nemo_embed_core/synthesize/generate.py", "return _unanswered(open_looks[0], failed) if open_looks else None", "return None", "tests/synthesize/test_generate.py -k judge"),
    Mutant("a document whose vector is NaN is found", "nemo_embed_core/synthesize/assemble.py", 'matrix, _ = encoding.rows(texts, "", MAX_LENGTH, "document")', "matrix = encoder.encode(texts)", "tests/synthesize/test_assemble.py"),
    Mutant("one generator's licence is all generators'", "nemo_embed_core/synthesize/assemble.py", 'licence or f"unknown ({maker})" for maker, licence in licence_of.items()', "filter(None, licence_of.values())", "tests/synthesize/test_generate.py -k another_document"),
    Mutant("what is in flight does not count in the budget", "nemo_embed_core/synthesize/journal.py", '            self.spent += event["worst"]\n            return', "            return", "tests/synthesize/test_journal.py"),
    Mutant("a cut line of the journal stays", "nemo_embed_core/synthesize/journal.py", "self._file.truncate(at)", "pass", "tests/synthesize/test_journal.py"),
    Mutant("the budget is looked at after the request", "nemo_embed_core/synthesize/ask.py", "self.journal.spent + cost > self.config.budget", "self.journal.spent > self.config.budget", "tests/synthesize/test_generate.py -k budget"),
    Mutant("a key stands in an error", "nemo_embed_core/synthesize/client.py", "{self._hidden(error.message)}", "{error.message}", "tests/synthesize/test_generate.py -k key"),
    Mutant("another mix of tasks changes every draw", "nemo_embed_core/synthesize/plan.py", '_stream(seed, "rest", index)', '_stream(seed, f"rest{len(tasks)}", index)', "tests/synthesize/test_plan.py"),
    Mutant("both of two copies go", "nemo_embed_core/synthesize/assemble.py", "if other < place}", "if other != place}", "tests/synthesize/test_generate.py -k planted"),
    Mutant("a negative that the judge finds useful stays", "nemo_embed_core/synthesize/generate.py", ">= config.generate.judge_grade) != is_positive", ">= config.generate.judge_grade) < is_positive", "tests/synthesize/test_generate.py -k judge"),
    Mutant("a pause is of one request alone", "nemo_embed_core/synthesize/client.py", "return max(at, self._paused_until) - now", "return at - now", "tests/synthesize/test_journal.py"),
]  # fmt: skip


class Outcome(NamedTuple):
    verdict: str  # caught, UNCAUGHT, explained, ERROR
    detail: str
    seconds: float


def copy_tree(folder: Path) -> Path:
    target = folder / "tree"
    shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return target


def pytest_in(tree: Path, tests: list[str], *options: str) -> tuple[int, str]:
    """(exit code, output); a test that hangs has noticed."""
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    # A folder of its own: the numbered ones of pytest are removed by whoever comes later, also while another
    # one is at work.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    command += [f"--basetemp={tree.parent / 'pytest'}", *options, *tests]
    process = subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return 1, f"{output}\nended after {TIMEOUT_S} s"


def plant(mutant: Mutant, trees: SimpleQueue[Path], passes: dict[str, bool]) -> Outcome:
    """passes: of tests that have noticed something, whether they pass in a healthy tree; a failure says
    nothing otherwise."""
    tree = trees.get()
    started, file = time.monotonic(), tree / mutant.file
    healthy = file.read_text(encoding="utf-8")
    try:
        if mutant.old not in healthy:
            return Outcome("ERROR", f"{mutant.file} has changed: it does not have {mutant.old!r}", 0.0)
        sick = healthy.replace(mutant.old, mutant.new)
        ast.parse(sick, mutant.file)
        file.write_text(sick, encoding="utf-8")
        code, output = pytest_in(tree, mutant.tests.split(), "-x", "-rfE")
        file.write_text(healthy, encoding="utf-8")
        noticed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.M)
        seconds = time.monotonic() - started
        if code == 0:
            return Outcome(
                "explained" if mutant.no_bug else "UNCAUGHT", mutant.no_bug or mutant.tests, seconds
            )
        if (
            code != 1 or not noticed
        ):  # no test ran, or a module cannot be imported: that is no bug that a test has to find
            return Outcome("ERROR", f"pytest ended with {code}: {' '.join(output.split())[-600:]}", seconds)
        test = noticed[1]
        if test not in passes:
            passes[test] = pytest_in(tree, [test])[0] == 0
        return (
            Outcome("caught", test, seconds)
            if passes[test]
            else Outcome("ERROR", f"{test} fails anyway", seconds)
        )
    finally:
        file.write_text(healthy, encoding="utf-8")
        trees.put(tree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="trees, each with one pytest at a time")
    parser.add_argument("words", nargs="*", help="only mutants whose name or file has one of these")
    options = parser.parse_args()
    words = [word.lower() for word in options.words]
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.name} {m.file}".lower() for word in words)]
    assert len({m.name for m in MUTANTS}) == len(MUTANTS), "two mutants have one name"
    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor(options.jobs) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(options.jobs):
            (folder := Path(name, str(i))).mkdir()
            trees.put(copy_tree(folder))
        printing, done = threading.Lock(), 0
        counts: dict[str, int] = {}
        passes: dict[str, bool] = {}

        def one(mutant: Mutant) -> None:
            nonlocal done
            outcome = plant(mutant, trees, passes)
            with printing:
                done += 1
                counts[outcome.verdict] = counts.get(outcome.verdict, 0) + 1
                place = f"[{done}/{len(chosen)}] {outcome.verdict:9s} {outcome.seconds:4.0f} s"
                print(f"{place}  {mutant.name} ({mutant.file})\n{'':21s}{outcome.detail}", flush=True)

        def kernels() -> None:
            tree = trees.get()
            code, output = pytest_in(tree, [KERNELS])
            trees.put(tree)
            with printing:
                if code != 0:
                    counts["UNCAUGHT"] = counts.get("UNCAUGHT", 0) + output.count("\nFAILED")
                    print(output[-3000:], flush=True)
                passed = int(output.split(" passed")[0].split()[-1])
                counts["caught"] = counts.get("caught", 0) + passed
                print(f"{passed} kernel mutants caught by {KERNELS}", flush=True)

        jobs = [pool.submit(kernels)] if not words else []
        jobs += [pool.submit(one, mutant) for mutant in chosen]
        for job in jobs:
            job.result()
    planted = sum(counts.values())
    print(f"{planted} planted: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    sys.exit(any(counts.get(bad) for bad in ("UNCAUGHT", "ERROR")))


if __name__ == "__main__":
    main()
