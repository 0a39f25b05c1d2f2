"""Adapters in PEFT's format, opened by PEFT itself beside the base that they were trained on."""

import dataclasses
import json
import zlib

import jax
import numpy as np
import pytest
from folders import write
from test_families import CASES, TOKENS, config_of, tensors_of

from lfjax.interop import hf, peft
from lfjax.models import lora
from lfjax.models.lora import LoRA

HOW = {
    "all": LoRA(3, 6.0),
    "all, rslora": LoRA(3, 5.0, rslora=True),
    "q, v and down": LoRA(2, 3.0, ("attention/[qv]$", "mlp/down")),
    "k and o, rslora": LoRA(2, 3.0, ("attention/[ko]$",), rslora=True),
}


def adapted(folder, how, head):
    """(base's parameters, the model, what is trained of it) of a folder; with `head` it gives a score."""
    base = hf.load(folder)
    config, params = base.model.config, base.params
    shapes = jax.eval_shape(lambda: {"lora": lora.init(jax.random.key(0), config, how)})
    if head:
        config = dataclasses.replace(config, num_labels=1)
        params = {name: group for name, group in params.items() if name != "unembed"}
        shapes["head"] = {"kernel": jax.ShapeDtypeStruct((config.width, 1), np.float32)}
    return params, config.build(), jax.tree_util.tree_map_with_path(noise, shapes)


def noise(path, shape):
    rng = np.random.default_rng(zlib.crc32(str(path).encode()))
    return np.float32(0.3 * rng.standard_normal(shape.shape))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT calls; of missing keys PEFT warns
@pytest.mark.parametrize(
    "how, head", [*((how, False) for how in HOW), ("all, rslora", True)], ids=[*HOW, "a reward model, rslora"]
)
@pytest.mark.parametrize("name", CASES)
def test_peft_opens_an_adapter_to_the_same_outputs(tmp_path, name, how, head):
    absent = "torch, transformers and peft are not all here: adapters were not opened by PEFT"
    torch, transformers, peer = (pytest.importorskip(m, reason=absent) for m in ("torch", "transformers", "peft"))
    folder, settings = write(tmp_path / "base", config_of(name), tensors_of(name)), HOW[how]
    base, model, trained = adapted(folder, settings, head)
    described = json.loads((folder / "config.json").read_text())
    merged = hf.loaded_from(model, lora.merge(base, trained, settings), config=described)
    adapter = peft.export(model.config, merged.config, trained, settings, str(folder))
    hf.save(tmp_path / "after", merged, adapter=adapter)

    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
    options = {"attn_implementation": "eager"} | ({"num_labels": 1} if head else {})
    tokens = torch.tensor(TOKENS[None])
    with torch.no_grad():
        plain = kind.from_pretrained(folder, **options)
        opened = peer.PeftModel.from_pretrained(plain, tmp_path / "after" / "adapter").eval()(tokens).logits
        whole = kind.from_pretrained(tmp_path / "after", **options).eval()(tokens).logits
    outputs = jax.jit(lambda base, trained: lora.bind(model, base, settings).apply({"params": trained}, TOKENS[None]))
    ours = outputs(base, trained)
    np.testing.assert_allclose(opened.numpy(), ours, rtol=0, atol=2e-4)
    np.testing.assert_allclose(whole.numpy(), ours, rtol=0, atol=2e-4)
    unchanged = outputs(base, {**trained, "lora": jax.tree.map(np.zeros_like, trained["lora"])})
    assert np.max(np.abs(unchanged - ours)) > 5e-4  # the adapter changes more than is allowed above
