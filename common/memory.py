"""The estimate of activation memory that trainers, sampler and toy print before they start."""


def activation_bytes(
    tokens: float, width: int, layers: int = 0, checkpointing: bool = True, inside: int = 40
) -> float:
    """Bytes of a transformer's activations in bfloat16: an estimate, not a bound.

    Args:
        tokens: of all samples at once; width: channels of the hidden state.
        layers: with a backward pass, which needs the input of each, without checkpointing all that
            is inside; 0 in inference.
        inside: values per token and channel in the one block that is computed.
    """
    kept = layers if checkpointing else layers * inside
    return tokens * width * 2 * (inside + kept)
