//! Records of messages, and rows of google.protobuf.Struct, as Python sees them.

use std::collections::HashSet;
use std::ops::Range;

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use crate::rows::{self, Number, Text};
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

/// Reads rows of google.protobuf.Struct.
#[pyclass(frozen, name = "RowReader", module = "forebay_native")]
pub struct PyRowReader {
    numbers: Vec<Number>,
    strings: Vec<Text>,
}

#[pymethods]
impl PyRowReader {
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

    /// The rows of the members that are whole, one after the other: a matrix of numbers, columns of
    /// strings, how many rows each of them has, and the places of the others.
    #[allow(clippy::needless_pass_by_value, clippy::type_complexity)] // PyO3 makes it for the call
    fn read<'py>(
        &self,
        py: Python<'py>,
        split: PyRef<'py, PySplit>,
        members: Vec<usize>,
    ) -> PyResult<(
        Bound<'py, PyBytes>,
        Columns,
        Vec<(usize, usize)>,
        Vec<usize>,
    )> {
        let mut values = Vec::with_capacity(members.len() * self.numbers.len() * 4);
        let mut columns: Columns = self.strings.iter().map(|_| Vec::new()).collect();
        let (mut good, mut odd) = (Vec::with_capacity(members.len()), Vec::new());
        for &at in &members {
            let records = split.records(py, at)?;
            let rows = records.iter();
            let rows = rows.map(|data| rows::read(data, &self.numbers, &self.strings));
            let Some(rows) = rows.collect::<Option<Vec<_>>>() else {
                odd.push(at);
                continue;
            };
            good.push((at, rows.len()));
            for row in rows {
                for value in row.numbers {
                    values.extend_from_slice(&(value as f32).to_ne_bytes());
                }
                for (column, text) in columns.iter_mut().zip(row.strings) {
                    column.push(PyString::new(py, text).unbind());
                }
            }
        }
        Ok((PyBytes::new(py, &values), columns, good, odd))
    }
}
