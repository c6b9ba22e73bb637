"""`/v1`: the API that OpenAI's own client library speaks, translated onto the same tasks as `/v2`.

    requests   a `/v1` body → one TaskRequest a choice, or a refusal by name
    answers    submits them, follows them, merges them; cancels what nobody waits for any more
    shapes     events → chunks, choices, log probabilities, usage
    routes     the paths

Nothing is scheduled, stored or relayed here. What isn't available is refused, never ignored.
"""
