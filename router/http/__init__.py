"""The OpenAI API and the router's own endpoints, over HTTP.

`app.py` routes; `chat.py` and `completions.py` are the two generating endpoints, `exchange.py` what they share: it runs
a request's sequences and answers whole or as a stream. `sse.py` and `protocol.py` are the way from frame to socket.
"""
