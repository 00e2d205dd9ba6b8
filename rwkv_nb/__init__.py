"""rwkv_nb: LoRA fine-tuning of RWKV in notebooks. Importing it does nothing; import the rooms you need."""

__version__ = "0.1.0"
