"""Records of tables: what their cells mean, and how they are read from text and Parquet."""
