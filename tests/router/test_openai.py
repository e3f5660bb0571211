"""The OpenAI API with the real client, over the network, in front of scripted workers."""

from scripted_worker import says


async def test_chat(cluster) -> None:
    """A chat completion has the text, the finish reason, the usage and where it was served."""
    worker = await cluster.worker(says("Hello there"))
    worker.cached_tokens = 4
    client = cluster.client(await cluster.router())
    raw = await client.chat.completions.with_raw_response.create(
        model="demo", messages=[{"role": "user", "content": "hi"}]
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert raw.headers["x-dynamo-instance"] == worker.instance
