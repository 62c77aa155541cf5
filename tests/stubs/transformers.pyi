"""What the package uses of transformers: reading all of it takes pyright 20 s."""

from typing import Any

AutoModelForCausalLM: Any
AutoTokenizer: Any
TrainerCallback: Any
