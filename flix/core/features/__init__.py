"""Features: their names, registry and ids, routing, dropout, and the cells that data comes in."""
