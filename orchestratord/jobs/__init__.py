"""What happens in the background, on arq: retention, the reconciling sweep, webhooks.

Read `runner.Jobs.run` first. Every function may run twice and may be killed at any point; each period's sweep is done
by one replica.
"""
