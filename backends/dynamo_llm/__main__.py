"""`python -m dynamo_llm` is `dynamo-llm`; the supervisor starts its children this way, so that they use its own Python."""

from dynamo_llm.cli import main

if __name__ == "__main__":
    main()
