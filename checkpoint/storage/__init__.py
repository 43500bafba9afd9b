"""DCP's storage readers and writers: files, object stores, stream extensions."""
