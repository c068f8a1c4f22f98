//! Names of files: plain paths with `/`, and what a resolver must refuse.

use vellum_core::{Asker, Code, Error, Result};

/// The path that `name` means to `asker`.
pub(crate) fn resolve(name: &str, asker: &Asker) -> Result<String> {
    let of = match asker {
        Asker::User => return Ok(name.to_owned()),
        Asker::Parent { of } | Asker::Part { of } => of,
    };
    if name.contains('\0') {
        return Err(Error::new(Code::NulInName, "the name holds a NUL byte").image(of));
    }
    let scheme = name.split(['/', '\\']).next().is_some_and(|first| first.contains(':'));
    if scheme || name.starts_with("//") || name.starts_with("\\\\") {
        return Err(
            Error::new(Code::RemoteRef, "the image names something that is not a local file").image(of)
        );
    }
    let name = name.replace('\\', "/");
    let name = name.trim_start_matches("./");
    if name.starts_with('/') || name.split('/').any(|part| part == "..") {
        return Err(Error::new(Code::PathEscape, "the image names a file outside its directory").image(of));
    }
    Ok(join(directory(&of.0), name))
}

pub(crate) fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

pub(crate) fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}

pub(crate) fn not_found(path: &str) -> Error {
    Error::new(Code::NotFound, "no such file").image(path)
}
