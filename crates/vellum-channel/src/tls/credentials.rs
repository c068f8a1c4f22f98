//! Certificates, keys, trust anchors and revocation lists, read from PEM.

use super::certificate::{Certificate, day};
use super::options::{Pem, TlsIdentity};
use crate::error::{Error, ErrorKind, error};
use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use std::borrow::Cow;
use std::io::{self, Read};

/// The most that is read of a PEM file: revocation lists of large issuers have some megabytes.
const FILE_MAX: u64 = 64 << 20;

/// A certificate with its chain, and its key.
pub(super) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Something wrong with what this side was given.
fn unusable(what: impl Into<String>) -> io::Error {
    error(ErrorKind::TlsCredentials, what)
}

fn text(pem: &Pem) -> io::Result<Cow<'_, [u8]>> {
    let path = match pem {
        Pem::Text(text) => return Ok(Cow::Borrowed(text)),
        Pem::File(path) => path,
    };
    let cannot = |error: io::Error| {
        let what = format!("cannot read {pem}: check its name and permissions");
        io::Error::from(Error::new(ErrorKind::TlsCredentials, what).because(error))
    };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(cannot)?;
    file.take(FILE_MAX + 1).read_to_end(&mut text).map_err(cannot)?;
    if text.len() as u64 > FILE_MAX {
        return Err(unusable(format!("{pem} has more than {FILE_MAX} bytes: it is no file of certificates")));
    }
    Ok(Cow::Owned(text))
}

/// All items of one type in `pem`, of which there must be at least one.
fn items<T: PemObject>(pem: &Pem, what: &str) -> io::Result<Vec<T>> {
    let text = text(pem)?;
    let found: Result<Vec<T>, pem::Error> = T::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| unusable(format!("{pem} is damaged: {}", damage(&error))))?;
    if found.is_empty() {
        return Err(unusable(format!("there is no {what} in {pem}: PEM text (-----BEGIN ...) is expected")));
    }
    Ok(found)
}

/// What is wrong with PEM text. (The library prints marker lines as lists of numbers.)
fn damage(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } => "a line -----END ... is missing".to_owned(),
        pem::Error::IllegalSectionStart { line } => {
            format!("the line \"{}\" begins nothing that is known", line.escape_ascii())
        }
        other => other.to_string(),
    }
}

/// The certificates and the key of one side. Whether they belong together is found by rustls.
pub(super) fn identity(from: &TlsIdentity) -> io::Result<Identity> {
    let chain: Vec<CertificateDer<'static>> = items(&from.certificates, "certificate")?;
    let own = Certificate::from_der(first(&chain))
        .map_err(|error| unusable(format!("the first certificate in {}: {error}", from.certificates)))?;
    if let Some(why) = out_of_date(&own) {
        tracing::warn!("own certificate {} {why}: peers will refuse it", own.describe());
    }
    Ok((chain, key(&from.key)?))
}

fn first<'a>(chain: &'a [CertificateDer<'_>]) -> &'a [u8] {
    chain.first().map_or(&[], |certificate| certificate.as_ref())
}

fn key(pem: &Pem) -> io::Result<PrivateKeyDer<'static>> {
    let text = text(pem)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        let is_encrypted = [&b"ENCRYPTED"[..], b"Proc-Type: 4"]
            .iter()
            .any(|mark| text.windows(mark.len()).any(|part| part == *mark));
        match error {
            pem::Error::NoItemsFound if is_encrypted => unusable(format!(
                "the key in {pem} is encrypted: store it in plain, readable by its owner only \
                 (openssl pkey -in KEY -out PLAIN)"
            )),
            pem::Error::NoItemsFound => unusable(format!(
                "there is no private key in {pem}: one in PEM form (PKCS#8, PKCS#1 or SEC1) is expected"
            )),
            other => unusable(format!("the key in {pem} is damaged: {}", damage(&other))),
        }
    })
}

/// The trust anchors in `pem`. Those that cannot vouch for anyone are left out; one at least must remain.
pub(super) fn anchors(pem: &Pem) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let mut unfit = None;
    for certificate in items::<CertificateDer<'static>>(pem, "certificate")? {
        let read =
            Certificate::from_der(&certificate).map_err(|error| unusable(format!("{pem}: {error}")))?;
        let why = out_of_date(&read).or_else(|| {
            (!read.may_certify)
                .then(|| "may not sign certificates (its key usage lacks keyCertSign)".to_owned())
        });
        if let Some(why) = why {
            let why = format!("the certificate {} {why}", read.describe());
            tracing::warn!("{pem}: {why}: it is not trusted");
            unfit = Some(why);
            continue;
        }
        roots.add(certificate).map_err(|error| {
            unusable(format!(
                "the certificate {} in {pem} cannot be a trust anchor: {error}",
                read.describe()
            ))
        })?;
    }
    match unfit {
        Some(why) if roots.is_empty() => {
            Err(unusable(format!("no certificate in {pem} can be trusted: {why}")))
        }
        _ => Ok(roots),
    }
}

fn out_of_date(certificate: &Certificate) -> Option<String> {
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
    if certificate.not_after < now {
        return Some(format!("expired on {}", day(certificate.not_after)));
    }
    (certificate.not_before > now).then(|| format!("is not valid before {}", day(certificate.not_before)))
}

/// The trust anchors of the system.
pub(super) fn system_anchors() -> io::Result<RootCertStore> {
    let mut found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(std::mem::take(&mut found.certs));
    if roots.is_empty() {
        let why = found.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
        return Err(unusable(format!(
            "the system has no trusted certificates{why}: install its ca-certificates, or name a file of them"
        )));
    }
    Ok(roots)
}

/// All revocation lists of `from`.
pub(super) fn revocation_lists(from: &[Pem]) -> io::Result<Vec<CertificateRevocationListDer<'static>>> {
    let mut lists = Vec::new();
    for pem in from {
        lists.extend(items(pem, "certificate revocation list")?);
    }
    Ok(lists)
}

/// An error of rustls about the credentials of this side.
pub(super) fn refused(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    Error::new(ErrorKind::TlsCredentials, what).because(error).into()
}
