//! An image as people see it.

use super::open_files;
use crate::terminal::Style;
use crate::text::{clean, exact_size};
use std::io::{self, Write};
use vellum::{Chs, Identity, ImageInfo, OpenedImage, ParentRef, Storage, Value};

/// Records deeper than this are shown as `...`; drivers do not go as deep.
const DEPTH_MAX: usize = 8;

/// Shows `images`, the top one first; `warnings` belong to none of them.
pub fn write(
    out: &mut dyn Write,
    style: Style,
    images: &[OpenedImage],
    warnings: &[String],
) -> io::Result<()> {
    for (index, image) in images.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        let name = style.title(&clean(&image.layer.location.0));
        match images.len() {
            1 => writeln!(out, "{name}")?,
            _ => writeln!(out, "{} {name}", style.dim(&format!("layer {index}:")))?,
        }
        write_rows(out, style, &rows(image), 2)?;
        write_warnings(out, style, image.layer.image.info())?;
    }
    for warning in warnings {
        writeln!(out, "{} {}", style.warning("warning:"), clean(warning))?;
    }
    Ok(())
}

fn write_warnings(out: &mut dyn Write, style: Style, info: &ImageInfo) -> io::Result<()> {
    if let Some(dirty) = &info.dirty {
        writeln!(out, "  {} {}", style.warning("not clean:"), clean(dirty))?;
    }
    for warning in &info.warnings {
        writeln!(out, "  {} {}", style.warning("warning:"), clean(warning))?;
    }
    Ok(())
}

/// A name, and the lines beside it or the rows below it.
struct Row {
    name: String,
    content: Content,
}

enum Content {
    Lines(Vec<String>),
    Rows(Vec<Row>),
}

fn row(name: &str, text: impl Into<String>) -> Row {
    Row { name: name.to_owned(), content: Content::Lines(vec![text.into()]) }
}

fn rows(image: &OpenedImage) -> Vec<Row> {
    let info = image.layer.image.info();
    let mut rows =
        vec![row("format", format_text(image)), row("virtual size", exact_size(info.virtual_size))];
    if info.block_size != 0 {
        rows.push(row("block size", exact_size(info.block_size)));
    }
    rows.extend(file_rows(image));
    if !info.files.is_empty() {
        let names = info.files.iter().map(|name| clean(name)).collect();
        rows.push(Row { name: "consists also of".to_owned(), content: Content::Lines(names) });
    }
    rows.extend(identity_rows(&info.identity));
    if let Some(parent) = &info.parent {
        rows.push(Row { name: "parent".to_owned(), content: Content::Rows(parent_rows(parent)) });
    }
    if !info.comment.is_empty() {
        let lines = info.comment.lines().map(clean).collect();
        rows.push(Row { name: "comment".to_owned(), content: Content::Lines(lines) });
    }
    let geometry = |name, chs: Option<Chs>| chs.map(|chs| row(name, chs_text(chs)));
    rows.extend(geometry("physical geometry", info.pchs));
    rows.extend(geometry("logical geometry", info.lchs));
    if !info.properties.is_empty() {
        let own =
            info.properties.iter().map(|property| value_row(property.name, &property.value, 0)).collect();
        rows.push(Row { name: format!("in the words of {}", info.format), content: Content::Rows(own) });
    }
    rows
}

fn format_text(image: &OpenedImage) -> String {
    let mut text = image.format.name().to_owned();
    let variant = &image.layer.image.info().variant;
    if !variant.is_empty() {
        text.push_str(&format!(", {}", clean(variant)));
    }
    if image.raw_by_default {
        text.push_str(" (it has the marks of no format; -f raw says so)");
    }
    text
}

fn file_rows(image: &OpenedImage) -> Vec<Row> {
    let files = open_files(image);
    if let [file] = files[..] {
        let mut rows = vec![row("file length", length_text(file))];
        rows.extend(file.allocated_bytes().map(|bytes| row("space on host", exact_size(bytes))));
        return rows;
    }
    let file_row = |file: &dyn Storage| {
        let space = file.allocated_bytes().map_or(String::new(), |b| format!(", {} on host", exact_size(b)));
        row(&clean(file.name()), format!("{}{space}", length_text(file)))
    };
    let rows = files.into_iter().map(file_row).collect();
    vec![Row { name: "files".to_owned(), content: Content::Rows(rows) }]
}

fn length_text(file: &dyn Storage) -> String {
    file.len().map_or_else(|error| format!("unknown: {error}"), exact_size)
}

fn identity_rows(identity: &Identity) -> Vec<Row> {
    let uuid = identity.uuid.map(|uuid| row("UUID", uuid.to_string()));
    let modification = identity.modification.map(|uuid| row("modification UUID", uuid.to_string()));
    let cid = identity.cid.map(|cid| row("content id", format!("{cid:08x}")));
    uuid.into_iter().chain(modification).chain(cid).collect()
}

fn parent_rows(parent: &ParentRef) -> Vec<Row> {
    let mut rows: Vec<Row> = parent.hints.iter().map(|hint| row(hint.field, clean(&hint.place))).collect();
    if parent.hints.is_empty() {
        rows.push(row("place", "not stored: it is recognised among the images of this directory"));
    }
    rows.extend(parent.format.as_ref().map(|format| row("format", clean(format))));
    rows.extend(identity_rows(&parent.expected));
    rows
}

fn chs_text(chs: Chs) -> String {
    format!("{} cylinders, {} heads, {} sectors", chs.cylinders, chs.heads, chs.sectors)
}

fn value_row(name: &str, value: &Value, depth: usize) -> Row {
    let content = match value {
        _ if depth >= DEPTH_MAX => Content::Lines(vec!["...".to_owned()]),
        Value::Record(members) => {
            Content::Rows(members.iter().map(|(name, value)| value_row(name, value, depth + 1)).collect())
        }
        Value::List(values) if values.iter().any(|value| scalar(value).is_none()) => {
            let numbered = values.iter().enumerate();
            Content::Rows(
                numbered.map(|(index, value)| value_row(&index.to_string(), value, depth + 1)).collect(),
            )
        }
        Value::List(values) if values.is_empty() => Content::Lines(vec!["none".to_owned()]),
        Value::List(values) => Content::Lines(values.iter().filter_map(scalar).collect()),
        other => Content::Lines(scalar(other).into_iter().collect()),
    };
    Row { name: clean(name), content }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Text(text) => Some(clean(text)),
        Value::Number(number) => Some(number.to_string()),
        Value::Bytes(bytes) => Some(exact_size(*bytes)),
        Value::Flag(true) => Some("yes".to_owned()),
        Value::Flag(false) => Some("no".to_owned()),
        Value::List(_) | Value::Record(_) => None,
    }
}

/// Writes rows with their values in one column.
fn write_rows(out: &mut dyn Write, style: Style, rows: &[Row], indent: usize) -> io::Result<()> {
    let of_lines = rows.iter().filter(|row| matches!(row.content, Content::Lines(_)));
    let width = of_lines.map(|row| row.name.chars().count()).max().unwrap_or(0);
    for row in rows {
        match &row.content {
            Content::Rows(below) => {
                writeln!(out, "{:indent$}{}", "", style.key(&row.name))?;
                write_rows(out, style, below, indent + 2)?;
            }
            Content::Lines(lines) => {
                // Padded by hand: escape sequences have no width.
                let padding = width.saturating_sub(row.name.chars().count()) + 2;
                let mut lines = lines.iter();
                let first = lines.next().map_or("", String::as_str);
                writeln!(out, "{:indent$}{}{:padding$}{first}", "", style.key(&row.name), "")?;
                for line in lines {
                    writeln!(out, "{:1$}{line}", "", indent + width + 2)?;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_in_one_column_and_records_below_their_name() {
        let nested = Value::Record(vec![("a", Value::Number(1)), ("long name", Value::Flag(true))]);
        let list = Value::List(vec![Value::Text("x\x1b".into()), Value::Bytes(2048)]);
        let rows = [row("name", "value"), value_row("list", &list, 0), value_row("record", &nested, 0)];
        let mut out = Vec::new();
        write_rows(&mut out, Style::default(), &rows, 2).unwrap();
        let expected = "  name  value\n  list  x\\u{1b}\n        2 KiB (2048 bytes)\n  record\n    a          1\n    long name  yes\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
