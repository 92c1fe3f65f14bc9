"""What Alembic runs around the revisions; server/registry/migrate.py hands it a connection that holds the lock.

To write a revision after a change of schema.py, from the project's root:
`python -m server.registry.migrate revision "what it adds"`. Read what it wrote before you commit it.
"""

from alembic import context

from server.registry.schema import METADATA

# No batch mode: it copies tables on SQLite, and dropping the old one would take along the rows that refer to it. SQLite adds and drops
# columns by itself.
context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
