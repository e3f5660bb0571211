-- Requests of router.py for wrk: chats that share a system prompt, each with a question of its own. The result is one
-- line of JSON. Environment: TOKENS, STREAM, SALT (a number; makes the prompts of one run unlike those of another).
local tokens, stream = os.getenv("TOKENS"), os.getenv("STREAM")
local number = tonumber(os.getenv("SALT")) * 1000000
local system = string.rep("You are a helpful assistant who answers in one sentence. ", 11)
local head = '{"model":"demo","temperature":0,"max_tokens":' .. tokens .. ',"stream":' .. stream
  .. ',"ignore_eos":true,"messages":[{"role":"system","content":"' .. system
  .. '"},{"role":"user","content":"'
local question = " was the number that I had in mind. "
  .. string.rep("What is the capital of France, and what is 12 + 30? ", 4) .. '"}]}'

wrk.method = "POST"
wrk.headers["content-type"] = "application/json"

request = function()
  number = number + 1
  return wrk.format(nil, nil, nil, head .. number .. question)
end

done = function(summary, latency, requests)
  local bad = summary.errors
  io.write(string.format(
    '{"requests":%d,"seconds":%f,"bytes":%d,"failed":%d,"p50_ms":%f,"p99_ms":%f}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    bad.connect + bad.read + bad.write + bad.status + bad.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
