//! Tables given by column: one message for each feature, with its name and its values. Which field has
//! which of them, the caller says; of a contract nothing else is known here.

use crate::rows::{Number, Text};
use crate::wire::{Field, field};

/// The fields of a column's message: its name, its values if they are numbers (doubles, packed or not),
/// its values if they are strings.
#[derive(Clone, Copy)]
pub struct Fields {
    pub name: u64,
    pub numbers: u64,
    pub strings: u64,
}

/// A table's values, by feature in the order of the features.
pub struct Table<'a> {
    pub rows: usize,
    /// NaN where missing.
    pub numbers: Vec<Vec<f32>>,
    /// Empty where missing.
    pub strings: Vec<Vec<&'a str>>,
}

enum Values<'a> {
    Numbers(Vec<f64>),
    Strings(Vec<&'a str>),
}

/// How many values a column has, for what it says of itself: it may be malformed further in.
pub fn size(mut column: &[u8], fields: Fields) -> usize {
    let mut size = 0;
    while let Some((number, value)) = field(&mut column) {
        size += match value {
            Field::Bytes(packed) if number == fields.numbers => packed.len() / 8,
            Field::Fixed64(_) if number == fields.numbers => 1,
            Field::Bytes(_) if number == fields.strings => 1,
            _ => 0,
        };
    }
    size
}

/// Reads a table. `None` when it is malformed, has an unknown name, one twice, columns of several
/// lengths or without values, or a value that its feature does not take.
pub fn read<'a>(
    columns: &[&'a [u8]],
    fields: Fields,
    numbers: &[Number],
    strings: &[Text],
) -> Option<Table<'a>> {
    let mut rows = 0;
    let mut found: Vec<Option<Vec<f32>>> = numbers.iter().map(|_| None).collect();
    let mut texts: Vec<Option<Vec<&'a str>>> = strings.iter().map(|_| None).collect();
    for column in columns {
        let (name, values) = one(column, fields)?;
        let length = match values {
            Values::Numbers(values) => {
                let at = numbers.iter().position(|n| n.name == name)?;
                let good = values.iter().all(|&v| numbers[at].takes(v));
                let narrow: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                if !good || found[at].replace(narrow).is_some() {
                    return None;
                }
                values.len()
            }
            Values::Strings(values) => {
                let at = strings.iter().position(|t| t.name == name)?;
                let length = values.len();
                let good = values.iter().all(|v| strings[at].takes(v));
                if !good || texts[at].replace(values).is_some() {
                    return None;
                }
                length
            }
        };
        if length == 0 || (rows != 0 && rows != length) {
            return None;
        }
        rows = length;
    }
    let missing = numbers
        .iter()
        .zip(&found)
        .any(|(n, v)| v.is_none() && n.needed)
        || strings
            .iter()
            .zip(&texts)
            .any(|(t, v)| v.is_none() && t.needed);
    (rows > 0 && !missing).then(|| Table {
        rows,
        numbers: found
            .into_iter()
            .map(|v| v.unwrap_or_else(|| vec![f32::NAN; rows]))
            .collect(),
        strings: texts
            .into_iter()
            .map(|v| v.unwrap_or_else(|| vec![""; rows]))
            .collect(),
    })
}

/// A column's name and values. Of both kinds it may have one.
fn one(mut column: &[u8], fields: Fields) -> Option<(&str, Values<'_>)> {
    let mut name = "";
    let (mut numbers, mut strings) = (Vec::new(), Vec::new());
    while !column.is_empty() {
        match field(&mut column)? {
            (n, Field::Bytes(text)) if n == fields.name => name = std::str::from_utf8(text).ok()?,
            (n, Field::Bytes(packed)) if n == fields.numbers => {
                let (each, rest) = packed.as_chunks::<8>();
                if !rest.is_empty() {
                    return None;
                }
                numbers.extend(each.iter().map(|&b| f64::from_le_bytes(b)));
            }
            (n, Field::Fixed64(bits)) if n == fields.numbers => numbers.push(f64::from_bits(bits)),
            (n, Field::Bytes(text)) if n == fields.strings => {
                strings.push(std::str::from_utf8(text).ok()?);
            }
            _ => return None,
        }
    }
    match (numbers.is_empty(), strings.is_empty()) {
        (_, true) => Some((name, Values::Numbers(numbers))),
        (true, false) => Some((name, Values::Strings(strings))),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::wire::mutations;

    const FIELDS: Fields = Fields {
        name: 1,
        numbers: 2,
        strings: 3,
    };

    fn number(name: &str, needed: bool) -> Number {
        Number {
            name: name.into(),
            least: 0.0,
            most: 9.0,
            needed,
        }
    }

    fn text(name: &str, needed: bool) -> Text {
        Text {
            name: name.into(),
            known: HashSet::from(["x".into(), "y".into()]),
            needed,
        }
    }

    fn numbers(name: &[u8], values: &[f64]) -> Vec<u8> {
        let mut out = vec![0x0a, name.len() as u8];
        out.extend(name);
        out.extend([0x12, values.len() as u8 * 8]);
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        out
    }

    fn strings(name: &[u8], values: &[&str]) -> Vec<u8> {
        let mut out = vec![0x0a, name.len() as u8];
        out.extend(name);
        for value in values {
            out.extend([0x1a, value.len() as u8]);
            out.extend(value.as_bytes());
        }
        out
    }

    fn table<'a>(columns: &[&'a [u8]]) -> Option<Table<'a>> {
        let features = [number("a", true), number("b", false)];
        read(columns, FIELDS, &features, &[text("s", false)])
    }

    #[test]
    fn columns_are_put_in_the_order_of_the_features_and_missing_ones_are_filled() {
        let (a, s) = (numbers(b"a", &[1.5, 2.0]), strings(b"s", &["x", "y"]));
        let read = table(&[&s, &a]).unwrap();
        assert_eq!((read.rows, &read.numbers[0]), (2, &vec![1.5, 2.0]));
        assert!(read.numbers[1].iter().all(|v| v.is_nan()) && read.numbers[1].len() == 2);
        assert_eq!(read.strings, [["x", "y"]]);
        assert_eq!(table(&[&a]).unwrap().strings, [["", ""]]);
        assert_eq!((size(&a, FIELDS), size(&s, FIELDS)), (2, 2));
    }

    #[test]
    fn numbers_need_not_be_packed() {
        let mut a = b"\x0a\x01a\x11".to_vec();
        a.extend(3.0_f64.to_le_bytes());
        assert_eq!(table(&[&a]).unwrap().numbers[0], [3.0]);
        assert_eq!(size(&a, FIELDS), 1);
    }

    #[test]
    fn odd_tables_are_left_alone() {
        let good = numbers(b"a", &[1.0, 2.0]);
        let mut both = good.clone();
        both.extend(b"\x1a\x01x");
        let mut ragged = b"\x0a\x01a\x12\x07".to_vec();
        ragged.extend([0; 7]);
        for odd in [
            numbers(b"c", &[1.0, 2.0]),                 // unknown
            numbers(b"a", &[1.0, 2.0]),                 // twice
            numbers(b"b", &[1.0]),                      // shorter
            numbers(b"b", &[]),                         // no values
            numbers(b"b", &[1.0, 10.0]),                // out of range
            numbers(b"s", &[1.0, 2.0]),                 // numbers for strings
            strings(b"b", &["x", "y"]),                 // strings for numbers
            strings(b"s", &["x", "z"]),                 // never seen
            b"\x0a\x01s\x1a\x01\xff\x1a\x01x".to_vec(), // no UTF-8
            both,
            ragged,
        ] {
            assert!(table(&[&good, &odd]).is_none(), "{odd:?}");
        }
        assert!(table(&[]).is_none());
        assert!(table(&[&strings(b"s", &["x"])]).is_none(), "a is needed");
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let whole = [numbers(b"a", &[1.5, 2.0]), strings(b"s", &["x", "y"])].concat();
        for data in mutations(&whole) {
            let _ = (table(&[&data]), size(&data, FIELDS));
        }
    }
}
