//! Protobuf's wire format, as far as walking over a message's fields needs it.

pub enum Field<'a> {
    Varint(u64),
    Fixed64(u64),
    /// Nobody asked for its value yet.
    Fixed32,
    Bytes(&'a [u8]),
}

/// The next field's number and value. `None` when malformed, or of a kind that proto3 has no use for.
pub fn field<'a>(data: &mut &'a [u8]) -> Option<(u64, Field<'a>)> {
    let tag = varint(data)?;
    let value = match tag & 7 {
        0 => Field::Varint(varint(data)?),
        1 => Field::Fixed64(u64::from_le_bytes(take(data, 8)?.try_into().ok()?)),
        2 => {
            let size = usize::try_from(varint(data)?).ok()?;
            Field::Bytes(take(data, size)?)
        }
        5 => {
            take(data, 4)?;
            Field::Fixed32
        }
        _ => return None,
    };
    Some((tag >> 3, value))
}

fn take<'a>(data: &mut &'a [u8], size: usize) -> Option<&'a [u8]> {
    let (head, rest) = data.split_at_checked(size)?;
    *data = rest;
    Some(head)
}

fn varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for i in 0..10 {
        let (&byte, rest) = data.split_first()?;
        *data = rest;
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
