import torch

from inheritune_ds.surgery.compare import tensor_sha256, weights_sha256


def test_weights_sha256_sees_names_dtypes_shapes_and_bits() -> None:
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    known = weights_sha256(base)
    assert weights_sha256({"b": base["b"], "a": base["a"]}) == known
    others: list[dict[str, torch.Tensor]] = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(2, 1), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": torch.tensor([1.0, 2.0000002]), "b": base["b"]},
        {"a": torch.tensor([2.0, 1.0]), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({known, *map(weights_sha256, others)}) == len(others) + 1
    assert tensor_sha256(base["a"].to(torch.bfloat16)) == tensor_sha256(base["a"].to(torch.bfloat16).clone())
