//! Tables and sizes for people.

use std::fmt;

/// Rows below a head, each column as wide as it needs to be.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&name| name.to_owned()).collect()] }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell: &String| cell.chars().count()).max()
        };
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        for row in &self.rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
            writeln!(formatter, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Bytes in the unit that a person reads them in, with three digits.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let (mut unit, mut scale) = (UNITS[0], 1_u64 << 10);
    for next in &UNITS[1..] {
        if bytes / scale < 1024 {
            break;
        }
        (unit, scale) = (next, scale << 10);
    }
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    match tenths {
        0..1000 if !bytes.is_multiple_of(scale) => format!("{}.{} {unit}", tenths / 10, tenths % 10),
        _ => format!("{} {unit}", tenths / 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_a_person_reads_them_in() {
        for (bytes, text) in [
            (0, "0 KiB"),
            (512, "0.5 KiB"),
            (256 << 20, "256 MiB"),
            ((2 << 20) + (100 << 10), "2.0 MiB"),
            (1023 << 10, "1023 KiB"),
            (u64::MAX, "16777215 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "B"]);
        table.row(["long one".to_owned(), "b".to_owned()]);
        assert_eq!(table.to_string(), "A         B\nlong one  b\n");
    }
}
