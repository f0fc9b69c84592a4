"""The compiler's passes: each reads the plan and emits typed edits."""
