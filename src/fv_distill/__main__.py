"""`python -m fv_distill`, which is also what `accelerate launch -m fv_distill` starts."""

from fv_distill.cli import main

if __name__ == "__main__":
    main()
