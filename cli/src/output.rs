//! Printing: tables for people, JSON for programs, errors for both.

use crate::cmd::Global;
use crate::error::CliError;
use serde::Serialize;
use std::io::Write;

/// Prints a value as JSON on standard output.
pub fn json<T: Serialize>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CliError::Json(error.to_string()))?;
    line(&text)
}

/// Prints a value as one line of JSON, for streams.
pub fn json_line<T: Serialize>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string(value).map_err(|error| CliError::Json(error.to_string()))?;
    line(&text)
}

/// Prints a line on standard output. A reader that has gone (`drystone … | head`) is an error like any
/// other, not a panic.
pub fn line(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(|source| CliError::Io { what: "print to standard output".into(), source })
}

/// Confirms what was done: a sentence, or `{"done": sentence}`.
pub fn done(global: &Global, sentence: &str) -> Result<(), CliError> {
    if global.json { json(&serde_json::json!({ "done": sentence })) } else { line(sentence) }
}

/// Says on standard error what failed, why, and what can be done.
pub fn report(error: &CliError) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "error: {error}");
    if let Some(hint) = error.hint() {
        let _ = writeln!(out, "  hint: {hint}");
    }
}

/// Columns of text, left-aligned, or right-aligned where the heading begins with `>`.
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str]) -> Self {
        Self {
            right: headings.iter().map(|h| h.starts_with('>')).collect(),
            rows: vec![headings.iter().map(|h| h.trim_start_matches('>').to_string()).collect()],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as text, without a newline at the end.
    pub fn text(&self) -> String {
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        let lines: Vec<String> = self
            .rows
            .iter()
            .map(|row| {
                let cells: Vec<String> = row
                    .iter()
                    .zip(&widths)
                    .zip(&self.right)
                    .map(
                        |((cell, &width), &right)| {
                            if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
                        },
                    )
                    .collect();
                cells.join("  ").trim_end().to_string()
            })
            .collect();
        lines.join("\n")
    }

    /// Prints it.
    pub fn print(&self) -> Result<(), CliError> {
        line(&self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", ">SIZE"]);
        table.row(["vm1".into(), "10GiB".into()]);
        table.row(["database".into(), "1GiB".into()]);
        assert_eq!(table.text(), "NAME       SIZE\nvm1       10GiB\ndatabase   1GiB");
    }
}
