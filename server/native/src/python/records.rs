//! Records of messages, and the tables that are read from them, as Python sees them.

use std::collections::HashSet;
use std::ops::Range;

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::columns::{self, Fields, Table};
use crate::rows::{self, Number, Row, Text};
use crate::split as parts;

/// Messages that were taken apart at one field.
#[pyclass(frozen, name = "Split", module = "forebay_native")]
pub struct PySplit {
    messages: Vec<(Py<PyBytes>, Vec<Range<usize>>)>,
}

impl PySplit {
    /// The records of a message.
    fn records<'a>(&'a self, py: Python<'a>, at: usize) -> PyResult<Vec<&'a [u8]>> {
        let found = self.messages.get(at);
        let (message, ranges) = found.ok_or_else(|| PyIndexError::new_err(at))?;
        let data = message.as_bytes(py);
        Ok(ranges.iter().map(|r| &data[r.clone()]).collect())
    }

    fn all<'a>(&'a self, py: Python<'a>, members: &[usize]) -> PyResult<Vec<Vec<&'a [u8]>>> {
        members.iter().map(|&at| self.records(py, at)).collect()
    }
}

#[pymethods]
impl PySplit {
    /// Record `index` of each member, one after the other. None unless each member has `of` records,
    /// and this one has `size` bytes.
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes it for the call
    fn concat<'py>(
        &self,
        py: Python<'py>,
        members: Vec<usize>,
        index: usize,
        of: usize,
        size: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut all = Vec::with_capacity(size * members.len());
        for &at in &members {
            let records = self.records(py, at)?;
            match records.get(index) {
                Some(record) if records.len() == of && record.len() == size => {
                    all.extend_from_slice(record);
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(PyBytes::new(py, &all)))
    }
}

type Groups<'py> = Vec<(Bound<'py, PyBytes>, Vec<usize>)>;

/// Takes messages apart at a field: the pieces, the places of messages that share a head, and the
/// places of those that are not taken.
#[pyfunction]
pub fn split(
    py: Python<'_>,
    messages: Vec<Py<PyBytes>>,
    field: u64,
) -> (PySplit, Groups<'_>, Vec<usize>) {
    let mut heads: Vec<(Vec<u8>, Vec<usize>)> = Vec::new();
    let mut odd = Vec::new();
    let mut taken = Vec::with_capacity(messages.len());
    for (at, message) in messages.into_iter().enumerate() {
        let Some(found) = parts::split(message.as_bytes(py), field) else {
            odd.push(at);
            taken.push((message, Vec::new()));
            continue;
        };
        match heads.iter_mut().find(|(head, _)| *head == found.head) {
            Some((_, members)) => members.push(at),
            None => heads.push((found.head, vec![at])),
        }
        taken.push((message, found.records));
    }
    let groups = heads.into_iter();
    let groups = groups.map(|(head, members)| (PyBytes::new(py, &head), members));
    (PySplit { messages: taken }, groups.collect(), odd)
}

type Columns = Vec<Vec<Py<PyString>>>;
/// Values as native float32; a column of each feature of strings; which members were read, and how many
/// rows each has; and the others.
type Read<'py> = (
    Bound<'py, PyBytes>,
    Columns,
    Vec<(usize, usize)>,
    Vec<usize>,
);

/// More bytes than this are read without the interpreter: other threads need it meanwhile. For fewer it is
/// not worth waiting for it again.
const WORTH_DETACHING: usize = 32 << 10;

fn aside<T: Send>(py: Python<'_>, records: &[Vec<&[u8]>], run: impl FnOnce() -> T + Send) -> T {
    let bytes: usize = records.iter().flatten().map(|r| r.len()).sum();
    if bytes > WORTH_DETACHING {
        py.detach(run)
    } else {
        run()
    }
}

/// Reads the values of a model's features.
#[pyclass(frozen, name = "FeatureReader", module = "forebay_native")]
pub struct PyFeatureReader {
    numbers: Vec<Number>,
    strings: Vec<Text>,
}

impl PyFeatureReader {
    fn table_of_rows<'a>(&self, records: &[&'a [u8]]) -> Option<Vec<Row<'a>>> {
        let rows = records.iter();
        rows.map(|data| rows::read(data, &self.numbers, &self.strings))
            .collect()
    }

    fn table_of_columns<'a>(&self, records: &[&'a [u8]], fields: Fields) -> Option<Table<'a>> {
        columns::read(records, fields, &self.numbers, &self.strings)
    }
}

#[pymethods]
impl PyFeatureReader {
    #[new]
    fn new(
        numbers: Vec<(String, f64, f64, bool)>,
        strings: Vec<(String, HashSet<String>, bool)>,
    ) -> Self {
        let number = |(name, least, most, needed)| Number {
            name,
            least,
            most,
            needed,
        };
        let text = |(name, known, needed)| Text {
            name,
            known,
            needed,
        };
        Self {
            numbers: numbers.into_iter().map(number).collect(),
            strings: strings.into_iter().map(text).collect(),
        }
    }

    /// Tables by row: the values are a matrix [rows, numbers].
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes it for the call
    fn rows<'py>(
        &self,
        py: Python<'py>,
        split: PyRef<'py, PySplit>,
        members: Vec<usize>,
    ) -> PyResult<Read<'py>> {
        let records = split.all(py, &members)?;
        let tables: Vec<_> = aside(py, &records, || {
            records
                .iter()
                .map(|table| self.table_of_rows(table))
                .collect()
        });
        let (tables, good, odd) = sorted(members, tables, Vec::len);
        let mut values = Vec::new();
        let mut columns: Columns = self.strings.iter().map(|_| Vec::new()).collect();
        for row in tables.into_iter().flatten() {
            for value in row.numbers {
                values.extend_from_slice(&(value as f32).to_ne_bytes());
            }
            for (column, text) in columns.iter_mut().zip(row.strings) {
                column.push(PyString::new(py, text).unbind());
            }
        }
        Ok((PyBytes::new(py, &values), columns, good, odd))
    }

    /// Tables by column, of messages with these fields: the values are a matrix [numbers, rows].
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes it for the call
    fn columns<'py>(
        &self,
        py: Python<'py>,
        split: PyRef<'py, PySplit>,
        members: Vec<usize>,
        fields: (u64, u64, u64),
    ) -> PyResult<Read<'py>> {
        let records = split.all(py, &members)?;
        let fields = fields_of(fields);
        let (tables, good, odd, values) = aside(py, &records, || {
            let all = records.iter();
            let tables = all.map(|columns| self.table_of_columns(columns, fields));
            let tables = tables.collect();
            let (tables, good, odd) = sorted(members, tables, |t| t.rows);
            let mut values = Vec::new();
            for at in 0..self.numbers.len() {
                for value in tables.iter().flat_map(|t| &t.numbers[at]) {
                    values.extend_from_slice(&value.to_ne_bytes());
                }
            }
            (tables, good, odd, values)
        });
        let texts = (0..self.strings.len()).map(|at| {
            let column = tables.iter().flat_map(|t| &t.strings[at]);
            column
                .map(|text| PyString::new(py, text).unbind())
                .collect()
        });
        Ok((PyBytes::new(py, &values), texts.collect(), good, odd))
    }
}

/// How many values the first column of each member has, by what it says of itself.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // PyO3 makes it for the call
pub fn column_sizes(
    py: Python<'_>,
    split: PyRef<'_, PySplit>,
    members: Vec<usize>,
    fields: (u64, u64, u64),
) -> PyResult<Vec<usize>> {
    let fields = fields_of(fields);
    let first = |table: Vec<&[u8]>| table.first().map_or(0, |c| columns::size(c, fields));
    Ok(split.all(py, &members)?.into_iter().map(first).collect())
}

fn fields_of((name, numbers, strings): (u64, u64, u64)) -> Fields {
    Fields {
        name,
        numbers,
        strings,
    }
}

/// What was read, of which members with how many rows each; and the members that were not.
fn sorted<T>(
    members: Vec<usize>,
    tables: Vec<Option<T>>,
    rows: impl Fn(&T) -> usize,
) -> (Vec<T>, Vec<(usize, usize)>, Vec<usize>) {
    let (mut read, mut good, mut odd) = (Vec::with_capacity(tables.len()), Vec::new(), Vec::new());
    for (at, table) in members.into_iter().zip(tables) {
        if let Some(table) = table {
            good.push((at, rows(&table)));
            read.push(table);
        } else {
            odd.push(at);
        }
    }
    (read, good, odd)
}
