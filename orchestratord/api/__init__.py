"""The HTTP surface: parse, call the orchestrator, serialise. No decision about a task is made in here.

Read `app.create_app` first, then `tasks` (`/v2`) and `openai` (`/v1`), which are two dialects of the same calls.
"""
