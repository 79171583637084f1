"""`python -m peft_quant`."""

from .cli import main


if __name__ == "__main__":
    main()
