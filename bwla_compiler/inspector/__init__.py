"""What the compiler saw, decided and paid: data, terminal, page."""
