"""Write tokens.bin: 16,385 synthetic uint16 tokens in 0..31, each given by the one before, but for noise.

`python tests/golden/make_tokens.py`. Pure integer arithmetic, so that every machine writes the same bytes.
"""

import struct
from pathlib import Path

COUNT = 512 * 32 + 1


def main() -> None:
    state, token = 12345, 2
    tokens = []
    for _ in range(COUNT):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth's MMIX generator
        noise = state >> 33
        token = (5 * token + 7) % 32 if noise % 8 else noise // 8 % 32
        tokens.append(token)
    (Path(__file__).parent / "tokens.bin").write_bytes(struct.pack(f"<{COUNT}H", *tokens))


if __name__ == "__main__":
    main()
