"""Results for people and programs: pages, JSON documents, HTML reports."""
