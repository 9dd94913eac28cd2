"""Hugging Face checkpoints: layouts, dtypes, sharding, old configs, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

import mm_jax  # noqa: E402
from mm_jax.checkpoint.hf import abstract_params, load_hf, save_hf  # noqa: E402
from mm_jax.families import FAMILIES, Names  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_logits  # noqa: E402


def llama(directory: Path, dtype: str = "float32", save: dict | None = None, **options):
    config = transformers.LlamaConfig(**theirs.TEXT | options)
    return theirs.build(config, directory, dtype=dtype, **(save or {}))


def edit(directory: Path, **changes) -> None:
    """Changes config.json; None takes a field out."""
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def tiny(tmp_path):
    """A directory with a small Llama."""
    llama(tmp_path)
    return tmp_path


def test_shards_in_and_out(tmp_path):
    model = llama(tmp_path / "in", save={"max_shard_size": "20KB"})
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    lm = mm_jax.load(tmp_path / "in")
    same_logits(model, lm, theirs.rows(97))
    out = tmp_path / "out"
    mm_jax.save(lm, out)
    save_hf(out, lm.checkpoint, lm.params, shard_bytes=20_000)
    assert not (out / "model.safetensors").exists()  # it would be read instead of the new shards
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(v.equal(loaded.state_dict()[k]) for k, v in model.state_dict().items())
    mm_jax.save(lm, out)
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]
    for name in ("model-00001-of-00002.safetensors", "config.json"):
        (tmp_path / "in" / name).unlink(missing_ok=True)
    files = sorted((tmp_path / "in").glob("model-*.safetensors"))
    edit_back = dict(lm.checkpoint.values)
    (tmp_path / "in" / "config.json").write_text(json.dumps(edit_back))
    files[0].unlink()
    with pytest.raises(mm_jax.UserError, match=f"names files that are not there: {files[0].name}"):
        mm_jax.load(tmp_path / "in")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    """Kept as it is, computed in; or turned into float32, and then exact."""
    model = llama(tmp_path / "in", dtype)
    lm = mm_jax.load(tmp_path / "in")
    assert lm.config.dtype == {"bfloat16": "bfloat16", "float16": "float32"}[dtype]
    assert {x.dtype.name for x in jax.tree.leaves(lm.params)} == {dtype}
    rows = theirs.rows(97)
    same_logits(model, lm, rows, 0.1 if dtype == "bfloat16" else 0.01)
    same_after_saving(model, lm, rows, tmp_path / "out", "AutoModelForCausalLM")
    wide = mm_jax.load(tmp_path / "in", dtype="float32")
    same_logits(model.float(), wide, rows)
    mm_jax.save(wide, tmp_path / "wide")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert loaded.dtype == torch.float32


def test_hub_spelling_of_the_config(tmp_path):
    """Hub files say rope_theta, rope_scaling with "type" and torch_dtype, and leave out defaults."""
    scaling = {"type": "linear", "factor": 2.0}
    model = llama(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    edit(tmp_path, rope_parameters=None, rope_theta=5000.0, rope_scaling=scaling, torch_dtype="float32", dtype=None,
         rms_norm_eps=None, hidden_act=None, head_dim=None)  # fmt: skip
    lm = mm_jax.load(tmp_path)
    same_logits(model, lm, theirs.rows(97))


def test_head_in_the_file_wins(tmp_path):
    """A file with a head is untied whatever its config says; computed tables of old files are no surprise."""
    model = llama(tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    inverse = np.ones(4, np.float32)
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": inverse}))
    same_logits(model, mm_jax.load(tmp_path), theirs.rows(97))


def test_bare_model(tmp_path):
    """`LlamaModel` is saved without "model." and has no head: the embedding serves."""
    model = llama(tmp_path, tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert "norm.weight" in load_file(tmp_path / "model.safetensors")
    same_logits(model, mm_jax.load(tmp_path), theirs.rows(97))


def test_all_wrong_tensors_in_one_error(tiny):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 31), np.float32)
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)

    edit_tensors(tiny, spoil)
    with pytest.raises(mm_jax.UserError) as error:
        mm_jax.load(tiny)
    said = str(error.value)
    assert "1 missing: model.norm.weight" in said
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight" in said
    assert "model.layers.1.mlp.up_proj.weight [40, 31] instead of [40, 32]" in said


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="lama"), 'model_type "lama" is not known; did you mean "llama"'),
        (dict(hidden_act="mish"), "\"hidden_act\" is 'mish', which is not supported"),
        (dict(rope_parameters={"rope_type": "longrope"}), 'rope_type "longrope" is not supported'),
        (dict(partial_rotary_factor=0.5), '"partial_rotary_factor" .0.5., which is not supported'),
        (dict(quantization_config={"bits": 4}), '"quantization_config"'),
        (dict(rope_parameters={"rope_type": "linear"}), 'lacks the field "factor"'),
    ],
)
def test_unsupported_configs(changes, message, tiny):
    edit(tiny, **changes)
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(tiny)


def test_refused_directories(tiny):
    weights = tiny / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(mm_jax.UserError, match="is cut off"):
        mm_jax.load(tiny)
    weights.write_bytes(b"<html>no such file</html>")
    with pytest.raises(mm_jax.UserError, match="not a safetensors file"):
        mm_jax.load(tiny)
    weights.rename(tiny / "pytorch_model.bin")
    with pytest.raises(
        mm_jax.UserError, match=r"pytorch_model.bin.*save_pretrained\(...\) writes safetensors"
    ):
        mm_jax.load(tiny)
    (tiny / "pytorch_model.bin").unlink()
    with pytest.raises(mm_jax.UserError, match="neither model.safetensors nor"):
        mm_jax.load(tiny)
    weights.write_bytes(whole)
    with pytest.raises(mm_jax.UserError, match='dtype is "float33"; did you mean "float32"'):
        mm_jax.load(tiny, dtype="float33")
    with pytest.raises(mm_jax.UserError, match="no stages"):
        mm_jax.load(tiny, "align")


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_parameter_has_a_weight(kind, tmp_path):
    """The table of a family names exactly the parameters of its model."""
    values = {"model_type": kind}
    if kind == "voxtral":
        values["audio_token_id"] = 24  # the reference has no default
    # the reference's own defaults do not fit each other
    widths = {"qwen2_5_vl": 8192, "qwen3_vl": 4096, "qwen3_5": 4096, "qwen3_vl_moe": 2048}
    if kind == "qwen2_vl":
        values["vision_config"] = {"hidden_size": 8192}
    elif kind in widths:
        values["vision_config"] = {"out_hidden_size": widths[kind]}
    tied, own = frozenset(), frozenset({"lm_head.weight", "language_model.lm_head.weight"})
    # an embedding with rows of no word is no head
    for names in (own,) if kind == "mllama" else (tied, own):
        system = FAMILIES[kind].system(values, Names(names))
        paths = [weight.path for weight in system.weights]
        assert len(paths) == len(set(paths)) and set(paths) == set(abstract_params(system.config))


def test_files_travel(tiny, tmp_path):
    (tiny / "tokenizer.json").write_text("{}")
    lm = mm_jax.load(tiny)
    mm_jax.save(lm, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(mm_jax.UserError, match='format is "gguf"'):
        mm_jax.save(lm, tmp_path / "out", format="gguf")


def test_saving_in_place(tiny):
    """Over the directory that it came from, twice."""
    before = load_file(tiny / "model.safetensors")
    for _ in range(2):
        mm_jax.save(mm_jax.load(tiny), tiny)
    after = load_file(tiny / "model.safetensors")
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


def test_stops_where_the_reference_stops(tmp_path):
    """At the tokens of generation_config.json, one row earlier than the other, with padding after it."""
    model = llama(tmp_path)
    rows = theirs.rows(97, pad_left=True)
    free, _ = theirs.generate(model, rows)
    stops = [int(free[0, 3]), int(free[1, 9])]
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": stops}))
    edit(tmp_path, pad_token_id=1)
    lm = mm_jax.load(tmp_path)
    tensors = {name: torch.from_numpy(array) for name, array in rows.items()}
    expected = model.generate(
        **tensors, max_new_tokens=16, do_sample=False, eos_token_id=stops, pad_token_id=1
    )
    expected = expected[:, rows["input_ids"].shape[1] :].numpy()
    ours = lm.generate(lm.batch(**rows), 16)
    assert ours.shape[1] < 16 and 1 in ours
    assert np.array_equal(ours, expected)


MESH = """
import sys, jax, numpy as np
import mm_jax
from mm_jax.parallel.mesh import MeshConfig, make_mesh
from mm_jax.parallel.rules import Rules
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
lm = mm_jax.load(sys.argv[1], mesh=mesh, rules=Rules(vocab=()))
kernel = lm.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 20)}
rows = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], jax.jit(lm.apply)(lm.params, lm.batch(**rows)))
mm_jax.save(lm, sys.argv[4])
try:
    mm_jax.load(sys.argv[1], mesh=mesh)
except mm_jax.UserError as error:
    assert "vocab 97 cannot be split over tensor 2" in str(error), error
else:
    raise SystemExit("an uneven split passed")
"""


def test_straight_into_a_mesh(tmp_path):
    """On four devices: each holds its blocks, the logits are the reference's, and saving gathers them."""
    model = llama(tmp_path / "in")
    rows = theirs.rows(97)
    np.savez(tmp_path / "rows.npz", **rows)
    out = [tmp_path / "in", tmp_path / "rows.npz", tmp_path / "logits.npy", tmp_path / "out"]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", MESH, *map(str, out)], check=True, env=env)
    real = rows["attention_mask"].astype(bool)
    error = np.abs(np.load(tmp_path / "logits.npy") - theirs.logits(model, rows))[real].max()
    assert error <= 1e-4
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


def test_parameters_are_a_plain_dict(tiny):
    _, params = load_hf(tiny)
    assert all(isinstance(x, jax.Array) for x in flatten_dict(params).values())
