"""`anyattn bench`: how fast the engines are, beside what people use today, in one process, never on a wrong result."""
