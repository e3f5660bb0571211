"""`python -m dynamo_llm` is `dynamo-llm`; `up` starts its parts this way, so that they run under its own Python."""

from dynamo_llm.cli import main

if __name__ == "__main__":
    main()
