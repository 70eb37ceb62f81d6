"""How much arithmetic a case needs, whoever does it: matrix products only."""


def useful_flops(spec: dict, model: dict) -> float:
    """FLOPs of one run: what must be multiplied, not what an implementation happens to multiply.

    A backward pass is twice its forward pass; causal attention counts the half that is seen;
    logits count where a token is predicted.

    Args:
      spec: case, batch and lengths.
      model: sizes, see `cases.MODELS`.
    """
    batch = spec["batch"]
    if spec["case"] == "sft":
        length = spec["length"]
        return 3 * (forward(model, batch, length) + head(model, batch * (length - 1)))
    prompt, new = spec["prompt"], spec["new"]
    length = prompt + new
    whole = forward(model, batch, length)
    predicted = head(model, batch * new)
    if spec["case"] == "generate":
        return forward(model, batch, length - 1) + predicted
    if spec["case"] == "dpo":  # two sides; the reference forward, the policy forward and backward
        return 2 * 4 * (whole + predicted)
    sampling = forward(model, batch, length - 1) + predicted
    scoring = 3 * whole + predicted  # reference, reward model, critic
    update = 3 * (2 * whole + predicted)  # policy and critic
    return sampling + scoring + update


def forward(model: dict, batch: int, length: int) -> float:
    """The decoder layers on `batch` rows of `length` tokens."""
    width, heads = model["hidden_size"], model["num_heads"]
    kv_heads = model.get("num_kv_heads", heads)
    matrices = width * width * (2 + 2 * kv_heads / heads) + 3 * width * model["intermediate_size"]
    attention = 2 * width * (length + 1) / 2  # scores and sums over half of the positions
    return 2 * batch * length * model["num_layers"] * (matrices + attention)


def head(model: dict, tokens: int) -> float:
    """Logits of this many positions."""
    return 2 * tokens * model["hidden_size"] * model["vocab_size"]
