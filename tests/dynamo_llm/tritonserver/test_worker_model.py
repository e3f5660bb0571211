"""What a newer Triton than 2.51 asks of a model before it calls it ready."""

from dynamo_llm.hosts.tritonserver.worker_model import WorkerModel


class Deployment:
    """Begins and ends, and is as well as the test says."""

    healthy = True

    async def begin(self) -> None: ...

    async def end(self) -> None: ...


def test_readiness_follows_the_engine() -> None:
    """It is the service's health, whatever that is at the moment."""
    deployment = Deployment()
    model = WorkerModel(deployment, None)  # type: ignore[arg-type]
    try:
        assert model.is_ready()
        deployment.healthy = False
        assert not model.is_ready()
    finally:
        model.close()
